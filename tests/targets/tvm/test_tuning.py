"""Tuning of loops of TVM's own: what is searched for, what is kept, what is refused."""

from __future__ import annotations

import json
import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

tvm = pytest.importorskip("tvm")

from tvm.s_tir import meta_schedule  # noqa: E402
from tvm.script import tirx as T  # noqa: E402, N812
from tvm_harness import lowered  # noqa: E402

from onnxcomp import api  # noqa: E402
from onnxcomp.cpu import cpu_flags  # noqa: E402
from onnxcomp.errors import CompileError, DeviceError, RecipeError, TargetError, UnsupportedError  # noqa: E402
from onnxcomp.targets.tvm.boards import HOST, machine  # noqa: E402
from onnxcomp.targets.tvm.compile import compile_model  # noqa: E402
from onnxcomp.targets.tvm.importing import to_relax  # noqa: E402
from onnxcomp.targets.tvm.pipeline import fusion  # noqa: E402
from onnxcomp.targets.tvm.tuning import Tuning, search, store, tuner, worker  # noqa: E402
from onnxcomp.targets.tvm.tuning.tasks import find_tasks  # noqa: E402
from onnxcomp.verbs.resolve import make_target  # noqa: E402

X = {"x": np.random.default_rng(1).normal(size=(1, 8, 16, 16)).astype(np.float32)}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of results that is this test's own."""
    monkeypatch.setattr(store.platformdirs, "user_cache_path", lambda _: tmp_path / "cache")
    return tmp_path / "cache"


def deconvolutions(*, twice: bool = False, rows: int | str = 1) -> ir.Model:
    """Transposed convolutions of one size, which have no kernel of ours, and an activation, which has one."""
    b = Builder()
    y = b.input("x", [rows, 8, 16, 16])
    for _ in range(1 + twice):
        weight = b.const(b.rng.normal(size=(8, 8, 3, 3)).astype(np.float32))
        y = b.op("ConvTranspose", y, weight, pads=[1, 1, 1, 1])
        y = b.op("Relu", y)
    return b.output(y).model()


def fused(model: ir.Model):
    target = make_target("tvm-cpu")
    here = machine(HOST, "x86_64", cpu_flags())
    module = to_relax(lowered(model, target.lowering()), here).module
    with here.target():
        return tvm.transform.Sequential(fusion(here))(module)


def compiled(model: ir.Model, out, tuning: Tuning):
    target = make_target("tvm-cpu")
    here = machine(HOST, "x86_64", cpu_flags())
    return compile_model(model, out, here, target.capabilities(), target.lowering(), tuning)


def no_search(*_):
    raise AssertionError("nothing is to be measured")


def test_only_functions_worth_it_are_searched_for():
    found = find_tasks(fused(deconvolutions()))
    (task,) = found.tasks
    assert "conv2d_transpose" in task.functions[0]
    assert task.calls == 1
    assert task.flops >= 2 * 8 * 8 * 9 * 16 * 16


def test_functions_of_the_same_content_are_one_task():
    (task,) = find_tasks(fused(deconvolutions(twice=True))).tasks
    assert task.calls == 2
    (once,) = find_tasks(fused(deconvolutions())).tasks
    assert task.key == once.key


def test_functions_whose_shapes_are_not_fixed_are_named(tmp_path):
    artifact = compiled(deconvolutions(rows="n"), tmp_path / "out", Tuning(seconds=60))
    (entry,) = artifact.manifest["tuning"]
    assert not entry["used"]
    assert "--input" in entry["note"]


def test_a_schedule_that_computes_something_else_or_does_not_compile_is_not_taken(monkeypatch):
    name = "tvm.s_tir.tensor_intrin"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    (found,) = find_tasks(fused(deconvolutions())).tasks
    workload = meta_schedule.database.MemoryDatabase().commit_workload(found.workload)
    job = {"workload": workload.as_json(), "calls": 1, "record": None, "trials": 0}
    here = machine(HOST, "x86_64", cpu_flags())
    task = worker.Task(job, here, meta_schedule.cost_model.RandomModel(), most=8, seed=1)
    shapes = [[int(d) for d in p.shape] for p in found.workload["main"].params]

    @T.prim_func(s_tir=True)
    def zeros(a: T.handle, b: T.handle, c: T.handle):
        T.match_buffer(a, shapes[0])
        T.match_buffer(b, shapes[1])
        out = T.match_buffer(c, shapes[2])
        for i, j, k, m in T.grid(*shapes[2]):
            out[i, j, k, m] = T.float32(0)

    wrong = tvm.IRModule({"main": zeros.with_attr("global_symbol", "main")})
    assert task._right(task._built(found.workload))
    assert not task._right(task._built(wrong))
    for module in (wrong, tvm.IRModule({})):
        candidate = SimpleNamespace(sch=SimpleNamespace(mod=module))
        assert task._try(candidate) == (None, False)
        assert task.record is None


@pytest.mark.slow
def test_a_schedule_is_found_kept_and_used_again_without_measurement(tmp_path, cache, monkeypatch):
    told = []
    tuning = Tuning(seconds=300, trials=8, progress=lambda *what: told.append(what))
    artifact = compiled(deconvolutions(twice=True), tmp_path / "out", tuning)
    (entry,) = artifact.manifest["tuning"]
    assert entry["used"], entry
    assert entry["after_us"] < entry["before_us"]
    assert entry["calls"] == 2
    assert entry["trials"] == 8
    assert any("conv2d_transpose" in text and total == 300 for text, _, total in told)
    assert {"tuning_workloads.json", "tuning_records.json"} < set(artifact.manifest["files"])

    target = make_target("tvm-cpu")
    (found,) = target.load(target.open(artifact.path)).run(X).values()
    ort = make_target("ort-cpu")
    (wanted,) = ort.load(ort.compile(deconvolutions(twice=True), tmp_path / "ort")).run(X).values()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)

    (result,) = cache.rglob("*.json")
    assert result.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(tuner, "search", no_search)
    again = compiled(deconvolutions(), tmp_path / "again", Tuning(seconds=300))
    assert again.manifest["tuning"][0]["after_us"] == entry["after_us"]
    assert target.compile(deconvolutions(), tmp_path / "plain").manifest["tuning"] == []

    (artifact.path / "tuning_records.json").unlink()
    with pytest.raises(TargetError, match=r"tuning_records\.json is missing"):
        target.open(artifact.path)


def test_time_that_is_over_before_the_first_round_leaves_the_plain_loop(tmp_path):
    artifact = api.compile(deconvolutions(), tmp_path / "out", target="tvm-cpu", tune=0.2)
    (entry,) = artifact.manifest["tuning"]
    assert not entry["used"]
    assert "time was over" in entry["note"]
    assert set(artifact.manifest["files"]) == {"model.so", "weights.bin"}
    make_target("tvm-cpu").open(artifact.path)


def test_without_time_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "search", no_search)
    artifact = api.compile(deconvolutions(), tmp_path / "out", target="tvm-cpu", tune=0)
    assert "no time was given" in artifact.manifest["tuning"][0]["note"]


def test_what_is_not_faster_is_not_used(tmp_path, monkeypatch):
    def slower(tasks, known, workloads, here, tuning, keep):
        keep(tasks[0].key, store.Result(workload=workloads[tasks[0].key], trials=64, before_us=5.0, finished=True))
        return {}

    monkeypatch.setattr(tuner, "search", slower)
    (entry,) = compiled(deconvolutions(), tmp_path / "out", Tuning(seconds=9)).manifest["tuning"]
    assert not entry["used"]
    assert "no schedule was faster" in entry["note"]
    assert entry["trials"] == 64


def test_an_interrupt_keeps_the_artifact_that_is_there_and_ends_the_process(tmp_path, monkeypatch):
    target = make_target("tvm-cpu")
    first = target.compile(deconvolutions(), tmp_path / "out")
    started = []
    popen = search.subprocess.Popen

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(search.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(KeyboardInterrupt):
        compiled(deconvolutions(twice=True), tmp_path / "out", Tuning(seconds=60, progress=interrupted))
    (process,) = started
    assert process.returncode is not None
    assert target.open(tmp_path / "out").manifest == first.manifest
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_process_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_START", "import onnxcomp.no_such_module")
    with pytest.raises(CompileError, match="no_such_module"):
        compiled(deconvolutions(), tmp_path / "out", Tuning(seconds=60))
    assert not (tmp_path / "out").exists()


def test_a_schedule_that_crashes_ends_the_search_of_its_function_alone(tmp_path, monkeypatch):
    crash = "import os; print('{\"task\": 0}', flush=True); os.kill(os.getpid(), 11)"
    monkeypatch.setattr(search, "_START", crash)
    (entry,) = compiled(deconvolutions(), tmp_path / "out", Tuning(seconds=60)).manifest["tuning"]
    assert not entry["used"]
    assert entry["note"] == "no search: a schedule crashed"


def test_modules_in_the_current_folder_are_not_taken_for_those_of_the_search(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "numpy.py").write_text("raise SystemExit(7)", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (entry,) = compiled(deconvolutions(), tmp_path / "out", Tuning(seconds=2)).manifest["tuning"]
    assert "crash" not in entry["note"]


@pytest.mark.parametrize(("after", "kept"), [(0.9, True), (0.99, True), (1.1, False)])
def test_a_search_goes_on_from_a_schedule_that_is_still_faster(monkeypatch, after, kept):
    task, record = searched(monkeypatch, after)
    assert (task.record == record) == kept
    assert (task.best is not None) == kept


def searched(monkeypatch, after: float):
    """A search that starts with a record, which now takes `after` of the plain loop's time."""
    name = "tvm.s_tir.tensor_intrin"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(worker, "_interleaved", lambda *_: (1.0, after))
    (found,) = find_tasks(fused(deconvolutions())).tasks
    database = meta_schedule.database.MemoryDatabase()
    workload = database.commit_workload(found.workload)
    here = machine(HOST, "x86_64", cpu_flags())
    plan = tvm.s_tir.Schedule(found.workload)
    record = meta_schedule.database.TuningRecord(
        plan.trace,
        workload,
        [1.0],
        here.target(),
        meta_schedule.arg_info.ArgInfo.from_prim_func(found.workload["main"]),
    )
    job = {"workload": workload.as_json(), "calls": 1, "record": record.as_json(), "trials": 8}
    task = worker.Task(job, here, meta_schedule.cost_model.RandomModel(), most=8, seed=1)
    return task, job["record"]


@pytest.mark.parametrize("name", ["tvm-cpu:x86-64", "tvm-aarch64"])
def test_only_code_for_this_machine_is_tuned(name):
    with pytest.raises(DeviceError, match="tuning measures on this machine"):
        make_target(name).tuned(5.0)


def test_other_targets_have_nothing_to_tune(tmp_path):
    with pytest.raises(UnsupportedError, match="nothing to tune"):
        api.compile(deconvolutions(), tmp_path / "out", tune=5)
    with pytest.raises(RecipeError, match="number of seconds"):
        api.compile(deconvolutions(), tmp_path / "out", target="tvm-cpu", tune=-1)


def test_results_that_others_can_write_are_not_read(tmp_path):
    result = store.Result(workload=["1", "x"], before_us=1.0)
    store.write(tmp_path / "kept", "ab", result)
    assert store.read(tmp_path / "kept", "ab") == result
    assert store.read(tmp_path / "kept", "cd") is None
    (tmp_path / "kept" / "ab.json").chmod(0o620)
    with pytest.raises(CompileError, match="other users"):
        store.read(tmp_path / "kept", "ab")
    (tmp_path / "kept" / "ab.json").chmod(0o600)
    os.chmod(tmp_path / "kept", 0o777)
    with pytest.raises(CompileError, match="other users"):
        store.read(tmp_path / "kept", "ab")


@pytest.mark.parametrize("text", ["", "{", json.dumps({"workload": ["5", "TCc="], "before_us": 1.0, "trials": 3})])
def test_a_damaged_result_counts_as_none(tmp_path, monkeypatch, text):
    (task,) = find_tasks(fused(deconvolutions())).tasks
    place = store.folder(machine(HOST, "x86_64", cpu_flags()))
    place.mkdir(mode=0o700, parents=True)
    (place / f"{task.key}.json").write_text(text)
    artifact = compiled(deconvolutions(), tmp_path / "out", Tuning(seconds=0))
    assert "no result is kept" in artifact.manifest["tuning"][0]["note"]


def test_the_command_line_tells_what_became_of_each_function(tmp_path, monkeypatch, cli):
    def slower(tasks, known, workloads, here, tuning, keep):
        assert tuning.seconds == 7
        keep(tasks[0].key, store.Result(workload=workloads[tasks[0].key], trials=64, before_us=5.25, finished=True))
        return {}

    monkeypatch.setattr(tuner, "search", slower)
    ir.save(deconvolutions(), tmp_path / "model.onnx")
    given = ("compile", tmp_path / "model.onnx", "-o", tmp_path / "out", "--tune", "7")
    code, out, _ = cli(*given, "-t", "tvm-cpu")
    assert code == 0
    assert "conv2d_transpose" in out
    assert "5.2" in out
    assert "no schedule was faster" in " ".join(out.split())
    code, _, err = cli(*given)
    assert code == 2
    assert "nothing to tune" in err
    assert cli(*given[:-1], "-1", "-t", "tvm-cpu")[0] == 2
