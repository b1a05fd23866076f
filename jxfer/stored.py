"""What `jxfer features` shows of the stored features, and removes."""

import time
from collections.abc import Sequence
from typing import Any

from jxfer import paths, store
from jxfer.store import Known
from jxfer.typing import InputError


def table() -> Any:
    """Returns a table of all keys, the most recently used first; None where nothing is stored."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("Key", "Data set", "Model", "Boundary", "Examples", "Views", "Size", "Last used"):
        table.add_column(column, justify="right" if column in ("Examples", "Views", "Size") else "left", no_wrap=True)
    for known in store.list_keys():
        table.add_row(*_cells(known))
    return table if table.rows else None


def summary() -> str:
    """Returns one line: how many keys there are, what they take, and the limit."""
    keys = store.list_keys()
    if not keys:
        return f"no features are stored in {store.root()}"
    size, limit = sum(known.num_bytes for known in keys) / 1e9, store.limit_bytes() / 1e9
    return f"{len(keys)} key(s) in {store.root()}: {size:.3g} of at most {limit:g} GB ({store.LIMIT}={limit:g})"


def pick(keys: Sequence[str], *, every: bool) -> list[Known]:
    """Returns the keys that are named, each by its beginning where no other begins so.

    Raises:
      InputError: none is named, `every` and some are, or there is no such key.
    """
    known = {each.key: each for each in store.list_keys()}
    if every == bool(keys):
        raise InputError("name the KEY... to remove, as `jxfer features list` shows them, or give --all, not both")
    if every:
        return list(known.values())
    if not known:
        raise InputError(f"no key `{keys[0]}`: {summary()}")
    return [known[_full(key, known)] for key in dict.fromkeys(keys)]


def remove(known: Known) -> None:
    """Removes a key.

    Raises:
      InputError: a run uses it.
    """
    if not store.remove(known.key):
        raise InputError(f"a run uses the features under `{known.key}`; wait for it to end")


def _full(key: str, known: Any) -> str:
    found = [each for each in known if each.startswith(key)]
    if len(found) > 1:
        raise InputError(f"`{key}` begins several keys: {', '.join(found)}; give more of it")
    if not found:
        raise paths.unknown("key", key, known)
    return found[0]


def _cells(known: Known) -> tuple[str, ...]:
    names = store.names_of(known.key)
    augmented = known.fields.get("augment") is not None
    views = max((int(name.rpartition("#")[2]) + 1 for name in names), default=0) if augmented else 0
    examples = len({name.rpartition("#")[0] for name in names}) if augmented else len(names)
    data, model, boundary = (str(known.fields.get(name, "damaged")) for name in ("data", "model", "boundary"))
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(known.last_used))
    size = f"{known.num_bytes / 1e6:,.1f} MB"
    return known.key, data, model, boundary, f"{examples:,}", str(views or "–"), size, used
