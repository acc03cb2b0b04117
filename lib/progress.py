"""How far long work has got, with its rate and the time left: tqdm's bar on stderr. It is not there where
stderr is no terminal, or for ranks that print nothing, and it goes when the work is done.
"""
from tqdm import tqdm

from lib.ranks import first

def progress(items=None, what="", unit="it", total=None):
    """tqdm of items, or with update(n), of which `total` are expected."""
    return tqdm(items, desc=what, unit=" " + unit, total=total, leave=False, dynamic_ncols=True,
                disable=None if first() else True)
