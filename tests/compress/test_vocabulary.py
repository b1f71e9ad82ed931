"""Fewer tokens: the tokenizer spells what it did where its pieces stayed, and the model computes what it did."""

from __future__ import annotations

import pytest
import torch
from kit import tiny
from kit.architectures import build, without_loss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mptrain.compress.base import Site
from mptrain.compress.vocabulary import cut as tables
from mptrain.compress.vocabulary.methods import VocabularyCut
from mptrain.compress.vocabulary.tokenizer import check_fast, choose, cut
from mptrain.core.errors import ModelError, UserError
from mptrain.flow.vocabulary import changed, ids_in
from mptrain.recipe.vocabulary import Vocabulary

TRAIN = [
    f"the {a} {b} was {c}"
    for a in ("great", "greatest", "awful")
    for b in ("film", "filming", "plot")
    for c in ("unwatchable", "watched", "plotted")
]
OTHER = ["an unreadable screenplay, 1987 naïvely zigzagging", "the zebra watched unwatchable wizards"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def made(kind: str) -> PreTrainedTokenizerFast:
    """Trained on both, so that it has pieces that the first alone does not use."""
    common = {"vocab_size": 200, "special_tokens": SPECIAL, "show_progress": False}
    if kind == "WordPiece":
        inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer, inner.decoder = trainers.WordPieceTrainer(**common), decoders.WordPiece()
    elif kind == "BPE":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            **{**common, "vocab_size": 420}, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        inner.decoder = decoders.ByteLevel()
    else:
        inner = Tokenizer(models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer, inner.decoder = trainers.UnigramTrainer(**common, unk_token="[UNK]"), decoders.Metaspace()
    inner.train_from_iterator((TRAIN + OTHER) * 3, trainer)
    cls, sep = inner.token_to_id("[CLS]"), inner.token_to_id("[SEP]")
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def counts(tokenizer, texts):
    ids = torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]])
    return torch.bincount(ids, minlength=len(tokenizer))


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_texts_of_kept_pieces_have_the_same_and_others_are_spelled(kind, tmp_path):
    old = made(kind)
    kept = choose(old, counts(old, TRAIN), "used")
    assert kept == sorted(kept) and len(kept) < 0.9 * len(old)
    new = cut(old, kept)
    assert len(new) == len(kept) and new.get_vocab() == {
        t: kept.index(i) for t, i in old.get_vocab().items() if i in kept
    }
    for text in [*TRAIN, ("the great film", "was watched")]:
        given = text if isinstance(text, tuple) else (text,)
        assert [kept[i] for i in new(*given)["input_ids"]] == old(*given)["input_ids"]
    for text in OTHER:
        before, after = old(text)["input_ids"], new(text)["input_ids"]
        assert old.decode(before, skip_special_tokens=True) == new.decode(after, skip_special_tokens=True)
        assert after.count(new.unk_token_id) == before.count(old.unk_token_id) and len(after) >= len(before)
    assert any(len(new(text)["input_ids"]) > len(old(text)["input_ids"]) for text in OTHER)
    batch = new(["the film", "the greatest film was watched"], padding=True)["input_ids"]
    assert batch[0][-1] == new.pad_token_id == kept.index(old.pad_token_id)
    new.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again(t)["input_ids"] for t in TRAIN + OTHER] == [new(t)["input_ids"] for t in TRAIN + OTHER]


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_a_number_keeps_the_commonest(kind):
    old = made(kind)
    found = counts(old, TRAIN)
    used = choose(old, found, "used")
    fewer = choose(old, found, len(used) - 4)
    assert len(fewer) <= len(used) - 4 and set(fewer) < set(used) and set(old.all_special_ids) <= set(fewer)
    gone = set(used) - set(fewer)
    assert min(found[i] for i in fewer if found[i] and i not in old.all_special_ids) <= max(found[i] for i in gone) + 30
    cut(old, fewer)(TRAIN[0])
    with pytest.raises(UserError, match=r"vocabulary\.keep: 5 is below the .* have to stay"):
        choose(old, found, 5)


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_a_number_above_what_is_used_keeps_what_comes_first(kind):
    """Tokens that training never has, yet texts may: the commonest where the tokenizer was made have the first ids."""
    old = made(kind)
    found = counts(old, TRAIN)
    used = choose(old, found, "used")
    whole = choose(old, found, len(old))
    assert len(used) + 3 <= len(whole), "the texts use all of them"
    more = choose(old, found, len(used) + 3)
    assert set(used) < set(more) and len(used) < len(more) <= len(used) + 3
    added = sorted(set(more) - set(used))
    skipped = [i for i in whole if i < added[0] and i not in more]
    assert not skipped or kind == "BPE", "a piece that is passed over in BPE needs more than there was room for"


def test_places_that_are_kept_free_are_no_tokens_of_texts():
    """BERT's [unused0] … [unused993] stand before its words, and its tokenizer never gives one."""
    inner = made("WordPiece").backend_tokenizer
    free = [f"[unused{i}]" for i in range(3)]
    names = [*SPECIAL, *free, *(name for name in inner.get_vocab() if name not in SPECIAL)]
    inner.model = models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")
    kept = choose(tokenizer, torch.zeros(len(names), dtype=torch.int64), len(names) - 3)
    assert kept == [i for i, name in enumerate(names) if name not in free]


def test_characters_that_are_spelled_in_bytes_stay():
    """What a byte-level pre-tokenizer gives is no cut of the piece: that says nothing of whether texts have it."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.WordPieceTrainer(
        vocab_size=700, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet
    )
    inner.train_from_iterator((TRAIN + OTHER) * 3, trainer)
    old = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")
    new = cut(old, choose(old, counts(old, TRAIN), "used"))
    assert len(new) < len(old)
    for text in OTHER:
        assert "[UNK]" not in old.tokenize(text) and "[UNK]" not in new.tokenize(text)


def test_tokens_that_the_config_of_the_model_names_stay():
    """An end of text that stands among the places kept free is given by the model, not by a text."""
    tokenizer = made("WordPiece")
    model, _ = build("bert")
    unused = [i for i, n in enumerate(counts(tokenizer, TRAIN).tolist()) if not n]
    cuttable = sorted(set(unused) - set(choose(tokenizer, counts(tokenizer, TRAIN), "used")))
    model.config.eos_token_id = [cuttable[0]]
    kept = choose(tokenizer, counts(tokenizer, TRAIN), "used", tables.named(model))
    assert cuttable[0] in kept and cuttable[1] not in kept


def test_whole_words_and_slow_tokenizers_are_refused():
    with pytest.raises(ModelError, match="is a WordLevel, which has no smaller pieces"):
        check_fast(tiny.tokenizer())
    with pytest.raises(ModelError, match="is no fast tokenizer"):
        check_fast(object())


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "t5", "bart", "deberta-v2", "xlm-roberta", "mpnet"])
def test_the_model_computes_what_it_did_with_fewer_rows(name):
    model, batch = build(name)
    batch = without_loss(name, batch)
    size = model.get_input_embeddings().num_embeddings
    kept = [i for i in range(size) if i < 8 or i % 3]
    numbers = sum(p.numel() for p in model.parameters())
    done = tables.cut(model, kept, batch)
    assert done.config.get_text_config().vocab_size == len(kept) == done.get_input_embeddings().num_embeddings
    assert sum(p.numel() for p in done.parameters()) < numbers
    head = done.get_output_embeddings()
    if head is not None and getattr(done.config, "tie_word_embeddings", False) and name != "t5":
        assert head.weight is done.get_input_embeddings().weight


def test_a_special_token_of_the_model_that_is_cut_is_an_error():
    model, batch = build("bert")
    model.config.sep_token_id = 50
    with pytest.raises(ModelError, match="sep_token_id 50 of the model is no token that stays"):
        tables.cut(model, [i for i in range(99) if i != 50], without_loss("bert", batch))


def test_a_model_that_knows_ids_elsewhere_is_refused():
    model, batch = build("bert")
    inner = model.bert.embeddings.forward
    model.bert.embeddings.forward = lambda input_ids=None, **more: (
        inner(input_ids=input_ids, **more) * (1 + input_ids.float().mean())
    )
    with pytest.raises(ModelError, match=r"computes another .* once its tokens are cut"):
        tables.cut(model, sorted({1, *range(0, 99, 2)}), without_loss("bert", batch))


def test_all_merges_of_a_piece_are_kept_and_a_prefix_of_inner_pieces_is_none_of_them():
    merges = [("a", "bc"), ("a", "b"), ("ab", "c")]  # `bc` is a base piece: abc is built by the other way
    vocab = {piece: i for i, piece in enumerate(["a", "b", "c", "bc", "ab", "abc", "[UNK]"])}
    inner = Tokenizer(models.BPE(vocab, merges))
    old = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    assert old.tokenize("abc") == ["abc"]
    assert cut(old, choose(old, counts(old, ["abc"]), "used")).tokenize("abc") == ["abc"]

    vocab = {piece: i for i, piece in enumerate(["a", "##b", "##c", "ab", "abc", "[UNK]"])}
    inner = Tokenizer(models.BPE(vocab, [("a", "##b"), ("ab", "##c")], continuing_subword_prefix="##"))
    old = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    assert old.tokenize("abc") == ["abc"]
    assert cut(old, choose(old, counts(old, ["abc"]), "used")).tokenize("abc") == ["abc"]


def test_bytes_stay_where_characters_fall_back_to_them_and_no_unknown_piece_is_needed():
    bytes_ = [(f"<0x{i:02X}>", -9.0) for i in range(256)]
    letters = [(letter, -5.0) for letter in "abx0123456789ABCDEF<>"]
    inner = Tokenizer(models.Unigram([("<unk>", 0.0), *bytes_, *letters, ("ab", -1.0)], 0, byte_fallback=True))
    old = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert cut(old, choose(old, counts(old, ["a"]), "used")).tokenize("é") == old.tokenize("é") == ["<0xC3>", "<0xA9>"]

    inner = Tokenizer(models.Unigram([("a", -1.0), ("b", -1.0), ("ab", -0.5)]))
    old = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert cut(old, choose(old, counts(old, ["a"]), "used")).tokenize("ab") == ["a", "b"]


def test_what_generation_never_writes_is_renamed_and_what_is_cut_leaves_it():
    model, batch = build("bart")
    size = model.get_input_embeddings().num_embeddings
    kept = [i for i in range(size) if i != 10]
    model.generation_config.suppress_tokens = [10, 11]
    model.generation_config.begin_suppress_tokens = [10]
    model.generation_config.bad_words_ids = [[12], [10, 11], [9, 11]]
    found = tables.cut(model, kept, without_loss("bart", batch)).generation_config
    assert (found.suppress_tokens, found.begin_suppress_tokens) == ([10], None)
    assert found.bad_words_ids == [[11], [9, 10]]


def test_the_share_that_changed_is_of_rows_of_which_each_may_be_several_examples():
    class Windows:
        def __init__(self, vocab, windows):
            self.processor, self.windows, self.test = self, windows, range(len(windows))
            self.get_vocab = lambda: vocab

        def collate(self, examples):
            return {"input_ids": torch.tensor([self.windows[examples[0]][1]])}

        def row_of(self, split, index):
            return self.windows[index][0]

    before = Windows({"a": 0, "b": 1, "ab": 3}, [(0, [3]), (1, [0]), (2, [1, 0])])
    after = Windows({"a": 0, "b": 1}, [(0, [0]), (0, [1]), (1, [0]), (2, [1, 0])])
    assert changed(before, after, "test") == pytest.approx(1 / 3)
    assert len(ids_in(before.processor, before.processor)) == 4, "an id is left out"


def test_what_the_tokenizer_and_the_architecture_tell_is_refused_before_training():
    with pytest.raises(UserError, match=r"vocabulary\.keep: 5 is below the .* have to stay"):
        VocabularyCut.check_processor(Vocabulary(keep=5), made("WordPiece"))
    VocabularyCut.check_processor(Vocabulary(keep=190), made("WordPiece"))
    site = Site.beside(Vocabulary(), [Vocabulary()], [], length=8, causal=False, bytes=None)
    with pytest.raises(ModelError, match=r"Linear does not say where its embeddings .*: give its class get_input"):
        VocabularyCut.check(Vocabulary(), torch.nn.Linear(2, 2), site)
