"""A path where a logger's name is asked: a folder for TensorBoard."""

from __future__ import annotations

import re

from rarefy.system.loggers.tensorboard import TensorBoard


def of(text: str) -> TensorBoard | None:
    """None where ``package.module:Name`` is a logger of the user's own."""
    if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+:[A-Za-z_]\w*(:.*)?", text):
        return None
    return TensorBoard(folder=text)
