"""A service: POST a picture to /predict, get what the model says of it. MODEL=small/model.onnx uvicorn app:app

Pictures that come while the model runs wait, and go through it together, at most ``BATCH`` at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import onnxruntime
import pictures
from fastapi import FastAPI, HTTPException, Request
from PIL import Image

BATCH = int(os.environ.get("BATCH", "16"))
MOST_BYTES, MOST_PIXELS = 20_000_000, 50_000_000  # of a picture: its file, and what it unfolds to
SLOWEST = 30  # seconds in which it has to come
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # of which none starts a program, as EPS would
decoding = asyncio.Semaphore(os.cpu_count() or 1)  # pictures that are unfolded at once
reading = asyncio.Semaphore(64)  # and whose bytes come

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ.get("THREADS", "0"))
session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
about: dict[str, Any] = json.loads(session.get_modelmeta().custom_metadata_map["rarefy"])
waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue(maxsize=64 * BATCH)


async def work() -> None:
    """Run whatever waits, together."""
    while True:
        batch = [await waiting.get()]
        while len(batch) < BATCH and not waiting.empty():
            batch.append(waiting.get_nowait())
        inputs = {about["inputs"][0]["name"]: np.stack([one for one, _ in batch])}
        try:
            (answers,) = await asyncio.to_thread(session.run, [about["answer"]], inputs)
            for (_, answer), found in zip(batch, answers, strict=True):
                answer.done() or answer.set_result(found)
        except Exception as error:  # the next batch may go well
            for _, answer in batch:
                answer.done() or answer.set_exception(error)


@contextlib.asynccontextmanager
async def life(app: FastAPI) -> AsyncIterator[None]:
    worker = asyncio.create_task(work())
    yield
    worker.cancel()


app = FastAPI(title="rarefy", lifespan=life)


@app.get("/health")
def health() -> dict[str, Any]:
    return {"status": "ok", "task": about.get("task"), "waiting": waiting.qsize()}


def read(data: bytes) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, {MOST_PIXELS} at most")
    if "feed" in about:
        pixels, shift, scale = pictures.placed(image, about["feed"])
        return pixels, (shift, scale)
    return pictures.prepared(image, about["preprocessing"]), None


@app.post("/predict")
async def predict(request: Request, least: float = 0.3) -> dict[str, Any]:
    """The five likeliest classes of the picture in the body (its file's bytes), or its boxes of at least that score."""
    if reading.locked():
        raise HTTPException(503, "too many pictures come at once; try again in a second")
    async with reading:
        data = bytearray()
        try:
            async with asyncio.timeout(SLOWEST):
                async for part in request.stream():
                    data += part
                    if len(data) > MOST_BYTES:
                        raise HTTPException(413, f"a picture has at most {MOST_BYTES} bytes; send a smaller one")
        except TimeoutError as error:
            raise HTTPException(408, f"the picture took more than {SLOWEST} s to come; send it again") from error
        try:
            async with decoding:
                pixels, back = await asyncio.to_thread(read, bytes(data))
        except Exception as error:
            told = f"not a picture that can be read ({error}); send a JPEG's or PNG's bytes"
            raise HTTPException(400, told) from error
    answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
    if waiting.full():
        raise HTTPException(503, "too many pictures wait; try again in a second")
    waiting.put_nowait((pixels, answer))
    found = await answer
    if back is None:
        return {"classes": pictures.classes(found.reshape(-1), about)}
    return {"boxes": pictures.boxes(found, *back, about, least)}
