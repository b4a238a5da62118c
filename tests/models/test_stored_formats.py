"""Readers of quantised checkpoints against the libraries that pack them, to the last bit."""

from __future__ import annotations

import re

import pytest
import torch

from streamserve.errors import ModelLoadError
from streamserve.models.names import WeightNames
from streamserve.models.parameters import Module
from streamserve.models.pieces import module_pieces
from streamserve.models.quantised.modules import StoredModules, select_rows
from streamserve.models.quantised.reader import Tensors
from streamserve.models.quantised.stored import READERS
from tests.models.golden import CONFIGS, MemoryFiles, golden

NAME = "model.layers.0.mlp.down_proj"


def stored_modules(config, tensors, *, rows=None, parts=1):
    """One module that is made of ``parts`` of the same tensors, and what reads it."""
    reader = READERS[config["quant_method"]](config, "config.json")
    bases = [f"{NAME}{part}" for part in range(parts)]
    files = {f"{base}.{key}": tensor for base in bases for key, tensor in tensors.items()}
    names = WeightNames({"layers.down": tuple(bases)})
    view = Tensors(MemoryFiles(files), {name: name for name in files})
    return StoredModules(reader, view, names, None), names


def read(config, tensors, shape, parts=1):
    modules, names = stored_modules(config, tensors, parts=parts)
    module = Module("layers.down", "linear", (shape[0],) * parts, shape[1], layer=0)
    for piece in module_pieces(names, module, "weight"):
        assert modules.holds(module, piece)
        used, missing = modules.check(module, piece)
        assert missing == []
        assert set(used) == {f"{piece.base}.{key}" for key in tensors}
    return modules.read(module), modules.format(module)


@pytest.mark.parametrize("case", CONFIGS)
def test_the_weight_is_what_its_library_makes_of_it(case):
    tensors, expected = golden(case)
    stored, _ = read(CONFIGS[case], tensors, expected.shape)
    weight = stored.dequantise()
    assert weight.dtype == torch.float32
    if case == "bnb-int8":
        # The library multiplies by 1 / 127 last, here it is in the scale: two roundings apart.
        torch.testing.assert_close(weight, expected, rtol=2**-22, atol=0)
    else:
        # Products are exact in float32: the library rounds to the dtype of its scales, once.
        assert weight.to(expected.dtype).equal(expected)


@pytest.mark.parametrize("case", CONFIGS)
def test_parts_are_stacked_and_their_bytes_are_known_before(case):
    tensors, expected = golden(case)
    stored, planned = read(CONFIGS[case], tensors, expected.shape, parts=2)
    weight = stored.dequantise()
    one, _ = read(CONFIGS[case], tensors, expected.shape)
    assert weight.equal(torch.cat((one.dequantise(), one.dequantise())))
    assert planned.bits == getattr(stored, "bits", 8)
    assert planned.group in {None, getattr(stored, "group", None)}
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))
    assert select_rows(stored, order).dequantise().equal(weight[order])


def damaged(case, edit):
    """What the reader says to a golden case's tensors after ``edit``."""
    tensors, expected = golden(case)
    edit(tensors)
    with pytest.raises(ModelLoadError) as error:
        read(CONFIGS[case], tensors, expected.shape)
    return str(error.value)


@pytest.mark.parametrize(
    ("case", "key", "value", "message"),
    [
        ("gptq-4", "scales", torch.ones(2, 32).half(), "scales has shape [2, 32]"),
        ("gptq-4", "qzeros", torch.zeros(3, 4), "qzeros has dtype torch.float32"),
        ("gptq-4-act", "g_idx", torch.zeros(96, dtype=torch.int32), "does not put 32 inputs into"),
        ("awq-gemm", "qweight", torch.zeros(32, 12, dtype=torch.int32), "asks for [96, 4]"),
        ("awq-gemv", "scales", torch.ones(32, 8).half(), "asks for [32, 32]"),
        ("squeezellm-3", "lookup_table", torch.ones(32, 16), "asks for [32, 8]"),
        ("squeezellm-4-sparse", "cols", ..., "has numbers outside 0 to 95"),
        ("squeezellm-4-sparse", "rows", torch.arange(33).int(), "does not divide"),
        ("ct-pack-4-group", "weight_shape", torch.tensor([32, 90]), "is [32, 90]; the config"),
        ("ct-fp8-block", "weight_scale", torch.ones(1, 3), "asks for [2, 3]"),
        ("bnb-nf4-nested-96", "weight.absmax", torch.ones(9), "asks for [288]"),
        ("bnb-int8", "weight_format", torch.tensor(1, dtype=torch.uint8), "weight_format must be"),
    ],
)
def test_a_damaged_tensor_is_named(case, key, value, message):
    def edit(tensors):
        tensors[key] = torch.full_like(tensors[key], 96) if value is ... else value

    said = damaged(case, edit)
    assert f"tensor {NAME}0.{key}" in said
    assert message in said


OPTIONAL = ("g_idx", "weight_g_idx", "weight_format")
# Of these neither says how many there are.
SAME_LENGTH = {"cols": "vals"}
DAMAGES = {
    "longer": lambda tensor: torch.zeros(tensor.numel() + 1).to(tensor.dtype),
    "a number": lambda tensor: torch.zeros(()).to(tensor.dtype),
    "another type": lambda tensor: torch.zeros(tensor.shape, dtype=torch.float64),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_every_tensor_of_every_format_is_missed_and_judged(case):
    tensors, expected = golden(case)
    for key, tensor in tensors.items():
        name = f"{NAME}0.{key}"
        others = {other: value for other, value in tensors.items() if other != key}
        modules, names = stored_modules(CONFIGS[case], others)
        module = Module("layers.down", "linear", (expected.shape[0],), expected.shape[1], layer=0)
        [piece] = module_pieces(names, module, "weight")
        # Without its values a module of float8 is none.
        if key in OPTIONAL or (key == "weight" and not modules.holds(module, piece)):
            continue
        assert modules.holds(module, piece), f"{name} is missing"
        modules.format(module)  # memory is planned before the files are checked
        # A state's name says NF4 or FP4: of one that is missing nobody can tell.
        missing = modules.check(module, piece)[1]
        assert [found[:-3] for found in missing] == [name[:-3]]
        for damage, edit in DAMAGES.items():
            if damage == "a number" and tensor.numel() == 1:
                continue
            with pytest.raises(ModelLoadError) as error:
                read(CONFIGS[case], {**others, key: edit(tensor)}, expected.shape)
            said = str(error.value)
            named = f"memory: tensor {NAME}0.{SAME_LENGTH.get(key, key)} "
            assert named in said or f"memory: tensor {name} " in said, (damage, said)


def test_zeros_are_packed_in_words_or_are_none_of_int32():
    """Of the shape of the scales they would be taken for words."""
    tensors, expected = golden("ct-pack-4-group-asym")
    zeros = torch.zeros(tensors["weight_scale"].shape, dtype=torch.int32)
    config = CONFIGS["ct-pack-4-group-asym"]
    with pytest.raises(ModelLoadError, match=r"weight_zero_point has shape"):
        read(config, {**tensors, "weight_zero_point": zeros}, expected.shape)


def test_a_state_that_is_no_json_is_named():
    key = "weight.quant_state.bitsandbytes__nf4"
    said = damaged("bnb-nf4-96", lambda t: t.update({key: torch.zeros(9, dtype=torch.uint8)}))
    assert f"tensor {NAME}0.{key} is no state of a quantised weight" in said


GPTQ, AWQ = CONFIGS["gptq-4"], CONFIGS["awq-gemm"]
CT = CONFIGS["ct-pack-4-group"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**GPTQ, "bits": 5}, "gptq: bits 5 is not supported; these are: 2, 3, 4, 8"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({**GPTQ, "is_marlin_format": True}, "checkpoint_format 'marlin'"),
        ({**GPTQ, "dynamic": {"-:.*": {}}}, "dynamic {'-:.*': {}} is not supported"),
        ({**GPTQ, "pack_dtype": "int8"}, "pack_dtype 'int8'"),
        ({**GPTQ, "group_size": None}, "gptq: group_size is missing"),
        ({**GPTQ, "group_size": 0}, "group_size must be -1 or an integer of at least 1, got 0"),
        ({**AWQ, "version": "gemv_fast"}, "version 'gemv_fast' is not supported"),
        ({**AWQ, "bits": 8}, "awq: bits 8"),
        ({"quant_method": "squeezellm", "wbits": 2}, "wbits 2"),
        ({**CONFIGS["ct-fp8-block"], "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack"),
        ({**CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**CT, "transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({"quant_method": "compressed-tensors", "format": "dense"}, "config_groups is missing"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8: fmt 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size 128"),
    ],
)
def test_a_setting_that_is_not_read_is_refused_by_name(config, message):
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        READERS[config["quant_method"]](config, "config.json")


def test_a_zero_of_0_that_borrowed_from_its_neighbours_is_given_back():
    """As `convert_gptq_v2_to_v1_format_module` (gptqmodel/utils/model.py) takes one off a word."""
    tensors, expected = golden("gptq-4")
    generator = torch.Generator().manual_seed(3)
    zeros = torch.randint(0, 16, (3, 32), generator=generator)
    assert (zeros == 0).any()
    words = (zeros.view(3, 4, 8) << torch.arange(0, 32, 4)).sum(-1)
    v2, _ = read(
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        {**tensors, "qzeros": words.to(torch.int32)},
        expected.shape,
    )
    v1, _ = read(GPTQ, {**tensors, "qzeros": (words - 0x11111111).to(torch.int32)}, expected.shape)
    assert v1.zeros.equal(zeros.t().float())
    assert v2.zeros.equal(v1.zeros)
