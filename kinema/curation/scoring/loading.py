"""Reading released models through transformers: errors for people, and quiet.

Imports torch: stages import it when they open.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kinema.config.errors import KinemaError
from kinema.curation.scoring.model_files import ModelFiles
from kinema.models.pretrained import quiet_imports


def load_network(files: ModelFiles, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The network on the CPU, ready to be asked.

    Args:
        name: its class of transformers.

    Raises:
        KinemaError: weights that cannot be read or belong to another model.
    """
    network_class = getattr(import_transformers(name), name)
    with readable(files, "the weights"):
        network, report = network_class.from_pretrained(
            files.folder,
            local_files_only=True,
            dtype=dtype,
            weights_only=True,
            output_loading_info=True,
        )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise KinemaError(
            f"these are not the weights of the model that config.json describes: "
            f"{len(report['missing_keys'])} missing, {len(report['mismatched_keys'])} of another "
            "shape",
            where=str(files.folder),
        )
    return network.eval().requires_grad_(False)


@contextmanager
def readable(files: ModelFiles, what: str) -> Iterator[None]:
    """The readers of these files raise whatever they like, warn of what does not matter, and draw
    progress bars."""
    of_transformers = import_transformers().utils.logging
    logger = logging.getLogger("transformers")
    level, bars = logger.level, of_transformers.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    of_transformers.disable_progress_bar()
    try:
        yield
    except KinemaError:
        raise
    except ImportError as error:
        raise _missing(error.name or str(error)) from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise KinemaError(f"{what} cannot be read: {reason}", where=str(files.folder)) from None
    finally:
        logger.setLevel(level)
        if bars:
            of_transformers.enable_progress_bar()


def import_transformers(*names: str) -> Any:
    """The package, with these classes of it imported.

    Raises:
        KinemaError: it is not installed.
    """
    try:
        with quiet_imports():
            import transformers

            for name in names:
                getattr(transformers, name)
    except ImportError as error:
        raise _missing(error.name or "transformers") from None
    return transformers


def _missing(package: str) -> KinemaError:
    return KinemaError(
        f"released models need {package}, which is not installed",
        hint="pip install 'kinema[pretrained]'",
    )
