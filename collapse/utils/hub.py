"""Data sets of the Hugging Face hub, from its cache when the hub does not answer."""

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import Any

from collapse.utils.errors import DISK_FULL

# How long to wait for the hub: its client's own retries would take minutes.
HUB_SECONDS = 5.0


def load_from_hub(
    dataset: str, text_column: str, splits: tuple[str, ...]
) -> list[tuple[list[str], list[int]]] | None:
    """(texts, labels) of splits of a hub data set with a `label` column, from the hub or its cache.

    None, with the reason printed, when neither has them.
    """
    tables = _tables(dataset, splits, None)
    if tables is None:
        return None
    return [([t.strip() for t in table[text_column]], list(table["label"])) for table in tables]


def load_named_from_hub(
    dataset: str,
    splits: tuple[str, ...],
    text_column: str,
    class_column: str,
    configuration: str | None = None,
) -> list[list[tuple[str, str]]] | None:
    """(text, class name) pairs of splits of a hub data set, from the hub or its cache.

    class_column holds names, or numbers that the data set has names for. None as in load_from_hub.
    """
    tables = _tables(dataset, splits, configuration)
    if tables is None:
        return None
    splits_of_pairs = []
    for table in tables:
        names, feature = table[class_column], table.features[class_column]
        if hasattr(feature, "int2str"):
            names = feature.int2str(list(names))
        splits_of_pairs.append(list(zip(table[text_column], names, strict=True)))
    return splits_of_pairs


def load_all_splits(dataset: str, configuration: str | None) -> dict[str, Any] | None:
    """Every split of a hub data set as `datasets` has it, from the hub or its cache, or None."""
    tables = _tables(dataset, (None,), configuration)
    return tables and tables[0]


def _tables(
    dataset: str, splits: tuple[str | None, ...], configuration: str | None
) -> list[Any] | None:
    """The splits as `datasets` has them, or None with the reason printed; split None is all."""
    import datasets

    datasets.logging.set_verbosity_error()
    datasets.config.HF_HUB_OFFLINE = use_cache_if_hub_is_silent()
    try:
        return [datasets.load_dataset(dataset, configuration, split=split) for split in splits]
    except Exception as error:  # each of these libraries raises its own kinds for "not there"
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"NOTE: no {dataset} from the Hugging Face cache or hub ({reason})")
        return None


ASK_AGAIN_SECONDS = 120.0


@dataclass
class _Silence:
    """Whether the hub was silent, and until when this process does not ask it again."""

    until: float = 0.0  # by time.monotonic()
    switched: bool = False  # whether we set the libraries offline, not the user by HF_HUB_OFFLINE


_silence = _Silence()


def use_cache_if_hub_is_silent() -> bool:
    """Set Hugging Face's libraries offline while the hub does not answer; True when it does not.

    After two minutes the hub is asked again, and if it answers, the libraries go online again.
    """
    import huggingface_hub

    constants = huggingface_hub.constants
    if _silence.switched and time.monotonic() >= _silence.until:
        constants.HF_HUB_OFFLINE = _silence.switched = False
    if not constants.HF_HUB_OFFLINE and not _hub_answers():
        constants.HF_HUB_OFFLINE = _silence.switched = True
        _silence.until = time.monotonic() + ASK_AGAIN_SECONDS
    return constants.HF_HUB_OFFLINE


def _hub_answers() -> bool:
    """Whether the hub answers a short request within HUB_SECONDS, or another within twice that."""
    return any(_answers_within(seconds) for seconds in (HUB_SECONDS, 2 * HUB_SECONDS))


def _answers_within(seconds: float) -> bool:
    import huggingface_hub

    answers = []

    def ask() -> None:
        session, url = huggingface_hub.get_session(), huggingface_hub.constants.ENDPOINT
        with contextlib.suppress(Exception):
            answers.append(session.head(url, timeout=seconds).status_code < 500)

    # In a thread, because the lookup of a host name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers == [True]
