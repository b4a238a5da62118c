"""When the native backend is chosen, and what is said where it cannot be."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from streamserve_kernels import Kernels, NotRecordableError, bfloat16_pays, load
from streamserve_kernels.native import library
from streamserve_kernels.native.execute import Executable, pack_step
from streamserve_kernels.native.product import Product
from streamserve_kernels.pool import pool

BF16 = torch.bfloat16


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Lets the library be looked for at another path; it is forgotten again."""

    def look(path: Path) -> None:
        monkeypatch.setattr(library, "library_path", lambda build: path)
        library.load_library.cache_clear()

    yield look
    library.load_library.cache_clear()


def test_it_serves_bfloat16_of_sizes_that_its_cache_takes(native: Kernels) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("cpu", dtype=BF16) is native
        assert load("cpu", dtype=BF16, head_sizes=((64, 64), (192, 128)), block_size=48) is native
        assert bfloat16_pays(((64, 64), (192, 128)))
        assert load("cpu", dtype=torch.float32).name == "cpu"
        assert load("cpu", dtype=torch.float16).name == "cpu"
        assert load("cpu").name == "cpu"
        assert load("mps", dtype=BF16).name == "naive"
        for head_sizes, block_size in (
            (((63, 64),), 16),
            (((64, 64), (64, 24)), 16),
            (((64, 64),), 8),
        ):
            chosen = load("cpu", dtype=BF16, head_sizes=head_sizes, block_size=block_size)
            assert chosen.name == "cpu"
            assert not bfloat16_pays(head_sizes, block_size)


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="'cuda'"):
        load("cuda", "native")


def test_a_cpu_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_cpu_flags", lambda: library.BUILDS["v3"] - {"fma", "avx2"})
    assert not library.has_matrix_units()
    with pytest.warns(RuntimeWarning, match="slower ones do: this CPU has no avx2, fma"):
        assert load("cpu", dtype=BF16).name == "cpu"
    with pytest.raises(ImportError, match="cannot run here: this CPU has no avx2, fma"):
        load("cpu", "native")


def test_the_best_build_that_the_cpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for build, needed in library.BUILDS.items():
        monkeypatch.setattr(library, "_cpu_flags", lambda needed=needed: needed)
        assert library.runnable_builds()[0] == build
        for flag in needed:
            monkeypatch.setattr(library, "_cpu_flags", lambda less=needed - {flag}: less)
            assert build not in library.runnable_builds()


def test_every_build_is_made() -> None:
    setup = (Path(library.__file__).parents[3] / "setup.py").read_text()
    table = setup.split("BUILDS = {")[1].split("}")[0]
    assert re.findall(r'"(\w+)":', table) == list(library.BUILDS)


def test_a_library_that_was_not_built(
    native: Kernels, elsewhere: Callable[[Path], None], tmp_path: Path
) -> None:
    elsewhere(tmp_path / "_native.so")
    with pytest.warns(RuntimeWarning, match="slower ones do: it was not built"):
        assert load("cpu", dtype=BF16).name == "cpu"
    assert not bfloat16_pays(((64, 64),))
    with pytest.raises(ImportError, match="it was not built"):
        load("cpu", "native")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("cpu", dtype=torch.float32).name == "cpu"


def test_a_library_of_other_sources(
    native: Kernels,
    elsewhere: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    empty = tmp_path / "_native.so"
    empty.touch()
    elsewhere(empty)
    with pytest.raises(ImportError, match=r"_native\.so was built from other sources"):
        load("cpu", "native")
    monkeypatch.undo()
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    library.load_library.cache_clear()
    with pytest.warns(RuntimeWarning, match="was built from other sources: build it again"):
        assert load("cpu", dtype=BF16).name == "cpu"


def test_operations_are_those_of_the_c_sources() -> None:
    source = (Path(library.__file__).parent / "src" / "program.c").read_text()
    table = source.split("OPERATIONS[] = {")[1].split("}")[0]
    names = [name.strip().removeprefix("&ss_") for name in table.split(",") if name.strip()]
    assert tuple(names) == library.OPERATIONS
    assert f"int ss_abi(void) {{ return {library.ABI}; }}" in source


def test_a_product_is_told_what_c_reads() -> None:
    source = (Path(library.__file__).parent / "src" / "output.h").read_text()
    names = re.findall(r"^    (\w+),", source.split("PRODUCT_ARGS")[0], re.MULTILINE)
    assert tuple(name.lower() for name in names) == Product._fields


def test_a_step_that_points_nowhere_does_not_run(native: Kernels) -> None:
    table, out = torch.arange(12, dtype=BF16).view(4, 3), torch.zeros(2, 3, dtype=BF16)
    executable = Executable(1)
    executable.set([("embedding", (out.data_ptr(), table.data_ptr(), 3, 0, 1, 4))])
    for ids, fits in (([2, -1], True), ([0, 3], False), ([-2, 0], False), ([2**40, 0], False)):
        step = torch.tensor(ids)
        if fits:
            executable.run(pack_step(2, 0, 0, 0, step.data_ptr()), pool().threads())
            assert torch.equal(out, table[step + 1])
        else:
            with pytest.raises(IndexError, match="outside its embedding"):
                executable.run(pack_step(2, 0, 0, 0, step.data_ptr()), pool().threads())
    assert torch.equal(out, table[[3, 0]])


def test_arguments_and_threads_without_a_pool(
    native: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for many threads, it runs on the calling one where there are no others."""
    a, out = torch.ones(1000, 64, dtype=BF16), torch.zeros(1000, 64, dtype=BF16)
    executable = Executable(1)
    executable.set([("add", (out.data_ptr(), a.data_ptr(), a.data_ptr(), 64))])
    monkeypatch.setattr(executable, "_parallel", 0)
    executable.run(pack_step(1000), 7)
    assert torch.equal(out, a + a)


def test_a_recorded_forward_uses_its_memory_again(native: Kernels) -> None:
    recorder = native.recorder(4, 2)
    assert recorder is not None
    weight = torch.ones(9, 32, dtype=BF16)
    x = recorder.embedding(recorder.batch.input_ids, weight)
    for _ in range(20):
        x = recorder.activation(x, "relu")
    split = x.view(-1, 4, 8).split_with_sizes((1, 3), 1)
    del x
    y = recorder.activation(split[1], "relu")  # the row that it came from is in use
    assert y.address != split[0].address
    assert len(recorder.keep) == 1 + 2  # the weight, and what is read and written in turn


def test_given_hidden_states_stand_beside_others(native: Kernels) -> None:
    generator = torch.Generator().manual_seed(1)
    table, given = (torch.randn(7, n, generator=generator).to(BF16) for n in (18, 40))
    recorder = native.recorder(7, 7)
    assert recorder is not None
    recorder.give_hidden_states(40)
    batch = recorder.batch
    parts = recorder.embedding(batch.input_ids, table), batch.hidden_states
    x = recorder.gather(recorder.side_by_side(parts) * 0.5)
    recorded = recorder.finish(x, native.prepare_linear(torch.eye(58).to(BF16)), 1.0, None)
    empty = torch.zeros(1, dtype=torch.int32)
    for ids, rows in (([3, 0, 6, 6, 1], [0, 2, 4]), ([5], [0])):
        step = SimpleNamespace(
            input_ids=torch.tensor(ids),
            positions=torch.zeros(len(ids), dtype=torch.int64),
            slot_mapping=torch.full((len(ids),), -1),
            query_start_loc=torch.tensor([0, len(ids)], dtype=torch.int32),
            seq_lens=empty,
            block_table=empty[None],
            logits_indices=torch.tensor(rows),
            prefix_groups=None,
            adapters=None,
            states=None,
            hidden_states=given[: len(ids)],
        )
        expected = native.side_by_side((table[ids], given[: len(ids)]))[rows] * 0.5
        assert torch.equal(recorded.logits(step).to(BF16), expected)


def test_what_has_no_instruction_is_not_recorded(native: Kernels) -> None:
    recorder = native.recorder(4, 2)
    assert recorder is not None
    with pytest.raises(NotRecordableError, match=r"a weight of torch\.float32"):
        recorder.embedding(recorder.batch.input_ids, torch.ones(9, 32))
    with pytest.raises(NotRecordableError, match="an embedding of slot_mapping"):
        recorder.embedding(recorder.batch.slot_mapping, torch.ones(9, 32, dtype=BF16))
    with pytest.raises(NotRecordableError, match="with gaps"):
        recorder.embedding(recorder.batch.input_ids, torch.ones(32, 9, dtype=BF16).T)
    x = recorder.embedding(recorder.batch.input_ids, torch.ones(9, 32, dtype=BF16))
    with pytest.raises(NotRecordableError, match="a view of"):
        x.view(-1, 5)
    part = x.split_with_sizes((16, 16), 1)[0]
    with pytest.raises(NotRecordableError, match="gaps"):
        part + part
    head = load("cpu", "naive").prepare_linear(torch.ones(4, 32))
    with pytest.raises(NotRecordableError, match="hidden states of other rows"):
        recorder.finish(x, head, 1.0, None)
    with pytest.raises(NotRecordableError, match="NaiveLinear"):
        recorder.finish(recorder.gather(x), head, 1.0, None)
    cache = torch.zeros(2, 1, 16, 32, dtype=BF16)
    query = x.view(-1, 1, 32)
    batch = recorder.batch
    where = batch.block_table, batch.seq_lens, batch.query_start_loc
    with pytest.raises(ValueError, match="got 16, 32, 24"):
        recorder.paged_attention(query, cache, cache[..., :24].contiguous(), *where, scale=1.0)
