"""One int4 export of optimum-intel, as `optimum-cli export openvino --weight-format int4` makes it.

    python -m benchmarks.llm.peer_optimum MODEL OUT '{"group_size": 64, "gptq": true}' TEXTS.json

In a Python of its own (benchmarks/requirements-llm.txt), for optimum-intel pins an old transformers. The settings are
those of OVWeightQuantizationConfig, which the options of the command line become; the command line itself takes no
calibration texts of one's own. TEXTS.json: a list of texts, for settings that calibrate. Prints JSON.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    model, out, settings, texts = sys.argv[1:]
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    how: dict[str, Any] = json.loads(settings)
    if how.pop("calibrated", False):
        how |= {"dataset": json.loads(Path(texts).read_text()), "tokenizer": model}
    config = OVWeightQuantizationConfig(bits=4, **how)
    made = OVModelForCausalLM.from_pretrained(model, export=True, quantization_config=config)
    made.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": 1024 * int(peak.split()[1])}))


if __name__ == "__main__":
    main()
