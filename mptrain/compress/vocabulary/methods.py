"""The vocabulary cut as a method of a stage: model and tokenizer leave it together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mptrain.compress import base
from mptrain.compress.base import Method, Site, Sizes, Tools
from mptrain.compress.vocabulary import tokenizer
from mptrain.compress.vocabulary.cut import cut
from mptrain.core.errors import UserError
from mptrain.recipe.vocabulary import Vocabulary


class VocabularyCut(Method[Vocabulary]):
    order = base.PRUNE

    @classmethod
    def check(cls, config: Vocabulary, skeleton: nn.Module, site: Site) -> None:
        if site.length is None:
            raise UserError("vocabulary: this task reads no tokens; drop the stage")
        if site.causal:
            raise UserError(
                "vocabulary: the perplexity of a language model is of its tokens, and of others it is another measure;"
                " drop the stage, or cut the vocabulary of a model for another task"
            )

    @classmethod
    def outlook(cls, config: Vocabulary, skeleton: nn.Module, sizes: Sizes) -> Sizes:
        if config.keep == "used":
            return replace(sizes, known=False)
        table = skeleton.get_input_embeddings().weight  # type: ignore[operator]
        return replace(sizes, embeddings=sizes.embeddings - table[config.keep :].numel())

    @classmethod
    def check_processor(cls, config: Vocabulary, processor: Any) -> None:
        tokenizer.check_fast(processor)

    def finalize(self, model: nn.Module, tools: Tools) -> nn.Module:
        counts = tools.counts()
        kept = tokenizer.choose(tools.processor, counts, self.config.keep)
        self._facts = {"kept": len(kept), "of": len(counts), "used": int((counts > 0).sum())}
        self._made = tokenizer.cut(tools.processor, kept)
        return cut(model, kept, tools.inputs()[0])

    def processor(self) -> Any:
        return self._made

    def facts(self) -> dict[str, Any]:
        """kept: tokens, of so many; used: by the training split."""
        return self._facts
