"""A run in TensorBoard: train.py --tensorboard. It shows what log.jsonl has, with the same names.

    pip install molf[track]         # tensorboard
    tensorboard --logdir runs
"""

def summary_writer():
    """The class, or None where TensorBoard is not installed, or does not work."""
    try:
        from torch.utils.tensorboard import SummaryWriter   # only those who track need it
    except ImportError:
        return None
    return SummaryWriter

def writer(folder, step):
    """-> a SummaryWriter for what comes behind `step`. What it once wrote of later steps is not shown."""
    return summary_writer()(folder, purge_step=step + 1)

def scalars(record):
    """A record of log.jsonl -> {"loss": x, "lr/full": x, "share/q_proj": x, "held out/ES": x, ...}"""
    record = dict(record)
    del record["step"]
    held_out = record.pop("held_out", None)
    if held_out:
        values = {name: x["value"] for name, x in held_out.items() if isinstance(x, dict)}
        return {f"held out/{name}": x for name, x in ({"loss": record["loss"]} | values).items()}
    found = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= {f"{name}/{key}": x for key, x in value.items()}
        elif value is not None:
            found[name] = value
    return found

def add_record(to, record):
    for name, value in scalars(record).items():
        to.add_scalar(name, value, record["step"])
    to.flush()
