"""What the phases of a run have in common: the folder, the data as each model reads them, the processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mptrain.compress.calibrate.ranks import Ranks
from mptrain.data.load import Task, load_data
from mptrain.flow.stage_inputs import StageInputs
from mptrain.models.processor import load_processor
from mptrain.recipe.plan import Phase

MODEL = "model"


@dataclass(frozen=True)
class Context:
    """What every phase needs. inputs: of each stage. data, processor: as `inputs` say, loaded."""

    inputs: dict[str, StageInputs]
    data: Task
    processor: Any
    folder: Path
    plan: dict[str, list[Phase]]
    peers: PartialState
    allow_code: bool
    _read: dict[str, Task] = field(default_factory=dict, repr=False)

    def task(self, stage_id: str) -> Task:
        """The data as the model at the end of a stage reads them: by its own tokenizer, where the stage or one that it
        starts from left another."""
        stage_id = self.reads_as(stage_id)
        if stage_id == "model":
            return self.data
        if stage_id not in self._read:
            inputs = self.inputs[stage_id]
            spec = inputs.model.model_copy(update={"path": str(self.model_folder(stage_id)), "modeling": None})
            processor = load_processor(spec, self.allow_code)
            self._read[stage_id] = load_data(
                inputs.data, inputs.model.task, processor, seed=inputs.seed, allow_code=self.allow_code
            )
        return self._read[stage_id]

    def reads_as(self, stage_id: str) -> str:
        """The stage, or "model", that left the tokenizer by which the model at the end of a stage reads."""
        while stage_id != "model" and not self.inputs[stage_id].stage.rewrites:
            stage_id = self.inputs[stage_id].start
        return stage_id

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.peers.process_index, self.peers.num_processes)

    def model_folder(self, stage_id: str) -> Path:
        """Where the model at the end of a stage is; "model" is the one that the recipe starts from."""
        if stage_id == "model":
            return self.folder / "stages" / "model" / MODEL
        return self.folder / self.plan[stage_id][-1].folder / MODEL

    def phase_folders(self, stage_id: str) -> list[Path]:
        """Of the stage and of those it starts from, the last first, back to one that left another tokenizer."""
        found: list[Path] = []
        while stage_id != "model" and not self.inputs[stage_id].stage.rewrites:
            found += [self.folder / phase.folder for phase in reversed(self.plan[stage_id])]
            stage_id = self.inputs[stage_id].start
        return found
