"""The vocabulary cut as a method of a stage: model and tokenizer leave it together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mptrain.compress import base
from mptrain.compress.base import Method, Site, Sizes, Tools
from mptrain.compress.structure import low_rank, saved
from mptrain.compress.vocabulary import tokenizer
from mptrain.compress.vocabulary.cut import cut, named, table_of
from mptrain.core.embeddings import token_embedding
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
        table_of(skeleton)
        if config.rank is not None:
            low_rank.check(skeleton, "vocabulary.rank")

    @classmethod
    def outlook(cls, config: Vocabulary, skeleton: nn.Module, sizes: Sizes) -> Sizes:
        table = token_embedding(skeleton)
        if config.keep == "used" or not isinstance(table, nn.Embedding):
            return replace(sizes, known=False)
        kept = min(config.keep, table.num_embeddings)
        width = min(config.rank or table.embedding_dim, table.embedding_dim)
        widen = (width + 1) * table.embedding_dim if width < table.embedding_dim else 0
        less = table.weight.numel() - kept * width
        return replace(sizes, embeddings=sizes.embeddings - less, other=sizes.other + widen)

    @classmethod
    def check_processor(cls, config: Vocabulary, processor: Any) -> None:
        tokenizer.check_fast(processor)
        tokenizer.must_stay(processor, config.keep)

    def finalize(self, model: nn.Module, tools: Tools) -> nn.Module:
        counts = tools.counts()
        kept = tokenizer.choose(tools.processor, counts, self.config.keep, named(model))
        self._facts: dict[str, Any] = {"kept": len(kept), "of": len(counts), "used": int((counts > 0).sum())}
        self._made = tokenizer.cut(tools.processor, kept)
        model = cut(model, kept, tools.inputs()[0])
        if self.config.rank is not None:
            read = counts[kept]
            if self._made.pad_token_id is not None:
                read[self._made.pad_token_id] = 0  # half of a batch may be padding, which the mask hides
            explained = low_rank.factorize(model, self.config.rank, read)
            self._facts |= {"rank": self.config.rank, "explained": explained}
            if explained is not None:
                saved.remember_modules(model)
        return model

    def processor(self) -> Any:
        return self._made

    def facts(self) -> dict[str, Any]:
        """kept: tokens, of so many; used: by the training split. rank: of the embedding, where it became a product;
        explained: the share of what the rows that are read differ by that it holds; None, they had no more numbers."""
        return self._facts
