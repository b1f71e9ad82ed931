"""Classes of sounds, cut to `max_length` samples and prepared by the model's feature extractor.

A sound of another rate than the model's is resampled (polyphase, with a low-pass filter).
A model that takes the waveform gets it zero-padded to the longest of the batch, with an attention
mask where the extractor asks for one; a model that takes a spectrogram gets it as extracted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mptrain.core.errors import DataError
from mptrain.core.progress import track
from mptrain.data.sources.tables import Table
from mptrain.data.tasks import sounds
from mptrain.data.tasks.base import Batch, Example, Examples
from mptrain.data.tasks.classification import Classification
from mptrain.recipe import TASKS


class AudioClassification(Classification):
    kind = TASKS["audio-classification"]

    @classmethod
    def identity(cls, table: Table) -> list[str]:
        return sounds.digests(table, "audio")

    def encode(self, split: str, table: Table) -> Examples:
        rate, limit = self.processor.sampling_rate, self.spec.max_length
        self.min_length = rate // 40  # 25 ms, one frame: less gives a model nothing to convolve
        if limit < self.min_length:
            raise DataError(
                f"data.max_length: {limit} samples are {1000 * limit / rate:.0f} ms at {rate} Hz; for sound it counts"
                f" samples, so give e.g. {rate} for one second."
            )
        targets = self.targets(split, table)
        reading = track(range(len(table)), f"reading {split} sounds")
        lengths = [min(limit, len(self._sound(table, row))) for row in reading]

        def get(index: int) -> Example:
            return {"samples": self._sound(table, index)[:limit], "labels": targets[index]}

        return Examples(get, lengths)

    def _sound(self, table: Table, row: int) -> np.ndarray:
        wanted = self.processor.sampling_rate
        samples = sounds.resampled(*sounds.read_sound(table, "audio", row), wanted)
        if len(samples) < self.min_length:
            raise DataError(
                f"{table.place('audio', row)} is a sound of {1000 * len(samples) / wanted:.3g} ms; models need"
                f" {1000 * self.min_length / wanted:.0f}. Drop it."
            )
        return samples

    def collate(self, examples: list[Example]) -> Batch:
        batch = self._features([e["samples"] for e in examples])
        batch["labels"] = torch.tensor([e["labels"] for e in examples])
        return batch

    def _features(self, waves: Sequence[np.ndarray]) -> Batch:
        found = self.processor(
            list(waves), sampling_rate=self.processor.sampling_rate, padding=True, return_tensors="pt"
        )
        return {name: found[name] for name in self.processor.model_input_names if name in found}

    def example(self, batch: int, length: int) -> Batch:
        """`length` counts samples; shorter sounds are repeated to fill it. Raises DataError below `min_length`."""
        if length < self.min_length:
            raise DataError(
                f"An example of {length} samples was asked for, but {self.processor.sampling_rate} samples are a second"
                f" and {self.min_length} the least. For sound, evaluate.latency.length counts samples: set it, e.g. to"
                f" [{self.processor.sampling_rate}]."
            )
        return self.without_targets(self._features([np.resize(e["samples"], length) for e in self._longest(batch)]))
