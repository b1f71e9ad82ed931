"""int8 of a sentence encoder by sentence-transformers and optimum-intel, as their documentation has it.

    python peer.py FOLDER OUT TEXTS.csv SAMPLES

in a Python with sentence-transformers[openvino]; imports nothing of mptrain. FOLDER: of the model; TEXTS.csv: a column
`text`, of which SAMPLES are calibrated on. Prints the seconds it took and where the .xml is, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    folder, out, texts, samples = sys.argv[1:]
    from optimum.intel import OVQuantizationConfig
    from sentence_transformers import SentenceTransformer, export_static_quantized_openvino_model

    begun = time.perf_counter()
    model = SentenceTransformer(folder, backend="openvino")
    export_static_quantized_openvino_model(
        model,
        OVQuantizationConfig(num_samples=int(samples)),
        out,
        dataset_name=str(Path(texts).parent),
        dataset_config_name="default",
        dataset_split="train",
        column_name="text",
    )
    (made,) = Path(out).rglob("*qint8_quantized.xml")
    print(json.dumps({"seconds": time.perf_counter() - begun, "xml": str(made)}))


if __name__ == "__main__":
    main()
