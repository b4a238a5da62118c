"""What sentence-transformers' files say of a checkpoint's vectors."""

import json

import pytest

from streamserve.config import EmbeddingConfig
from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import read_embedding_config

KIND = "sentence_transformers.models."
QWEN = [
    {"idx": 0, "name": "0", "path": "", "type": f"{KIND}Transformer"},
    {"idx": 1, "name": "1", "path": "pool", "type": f"{KIND}Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{KIND}Normalize"},
]


def write(directory, *, modules=None, folder="pool", config=None, **modes):
    if modules is not None:
        (directory / "modules.json").write_text(json.dumps(modules))
    if modes:
        (directory / folder).mkdir()
        values = {"word_embedding_dimension": 64, "include_prompt": True}
        values |= {f"pooling_mode_{mode}": is_on for mode, is_on in modes.items()}
        (directory / folder / "config.json").write_text(json.dumps(values))
    (directory / "config.json").write_text(json.dumps(config or {}))


def read(directory, **options) -> EmbeddingConfig:
    return read_embedding_config(directory, 64, **options)


def test_without_files_it_is_the_last_token(tmp_path):
    write(tmp_path)
    assert read(tmp_path) == EmbeddingConfig(pooling="last", size=64)
    assert read(tmp_path, pooling="mean").pooling == "mean"


@pytest.mark.parametrize(
    ("modes", "pooling"),
    [
        ({"lasttoken": True, "mean_tokens": False}, "last"),
        ({"cls_token": False, "mean_tokens": True}, "mean"),
    ],
)
def test_the_files_say_which(tmp_path, modes, pooling):
    write(tmp_path, modules=QWEN, **modes)
    assert read(tmp_path).pooling == pooling
    assert read(tmp_path, pooling="last").pooling == "last"


def test_the_pooling_may_stand_alone(tmp_path):
    write(tmp_path, folder="1_Pooling", mean_tokens=True)
    assert read(tmp_path).pooling == "mean"


@pytest.mark.parametrize(
    ("modules", "modes", "message"),
    [
        (QWEN, {"cls_token": True}, r"pool/config.json: pooling_mode_cls_token is not supported"),
        (QWEN, {"mean_tokens": True, "max_tokens": True}, "mean_tokens, pooling_mode_max_tokens"),
        (QWEN, {"mean_tokens": False}, "no pooling mode is not supported"),
        ([*QWEN, {"type": f"{KIND}Dense"}], {"mean_tokens": True}, "a module 'Dense'"),
    ],
)
def test_what_is_not_built_is_refused_and_may_be_set_aside(tmp_path, modules, modes, message):
    write(tmp_path, modules=modules, **modes)
    with pytest.raises(UnsupportedModelError, match=message):
        read(tmp_path)
    assert read(tmp_path, pooling="mean").pooling == "mean"


def test_a_damaged_file_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"modules.json is no JSON"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("config", "matryoshka"),
    [
        ({"is_matryoshka": True}, True),
        ({"matryoshka_dimensions": [32, 64]}, (32, 64)),
        ({}, False),
    ],
)
def test_which_sizes_vectors_may_have(tmp_path, config, matryoshka):
    write(tmp_path, config=config)
    assert read(tmp_path).matryoshka == matryoshka
