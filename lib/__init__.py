"""What a reader of the method may skip. Every program of the project imports from here first."""
import sys

try:
    import fcntl        # noqa: F401
    import resource     # noqa: F401
except ModuleNotFoundError as e:
    sys.exit(f"error: this needs Linux or macOS: Python's module {e.name} is not here")
