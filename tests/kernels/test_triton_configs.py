"""The table of configurations, overrides, the file of measured configurations, and the search that writes it.

No GPU is needed, because the search takes functions that run and time a call.
"""

import json

import pytest
import torch

pytest.importorskip("triton")

from var_kernels.measured import tuned_tiles
from var_kernels.measured.tuned_tiles import Key
from var_kernels.triton import configs, tune
from var_kernels.triton.configs import Config, Row
from var_kernels.triton.targets import TARGETS, Target

KERNEL = "a_stem.a_kernel"
SMALL, LARGE, ANY = (Config({"TILE": tile}) for tile in (16, 128, 32))
HERE = Target("sm_90", "cuda", 90, 227 << 10, 132, device="Test GPU 9000 (X)")


@pytest.fixture(autouse=True)
def table(monkeypatch, tmp_path):
    monkeypatch.setenv("VAR_KERNELS_CACHE", str(tmp_path))
    rows = (
        Row(LARGE, size=64, itemsize=2, api="cuda", shared_memory=200 << 10, arch=90),
        Row(SMALL, size=64, itemsize=2),
        Row(ANY, size=256),
    )
    monkeypatch.setitem(configs.TABLE, KERNEL, rows)
    configs.tuned_on.cache_clear()
    yield tmp_path
    configs.tuned_on.cache_clear()


def test_the_first_row_that_fits_is_chosen():
    def chosen(target, size, itemsize):
        return configs.choose(KERNEL, TARGETS[target], size, itemsize)

    assert chosen("sm_90", 64, 2) is LARGE
    assert chosen("sm_80", 64, 2) is SMALL  # too old, and too little shared memory
    assert chosen("sm_120", 64, 2) is SMALL  # new enough, too little shared memory
    assert chosen("gfx942", 64, 2) is SMALL
    assert chosen("sm_90", 65, 2) is ANY and chosen("sm_90", 64, 4) is ANY
    with pytest.raises(ValueError, match="a_stem.a_kernel: expected a size that .* serve on sm_90, got 257"):
        chosen("sm_90", 257, 2)


def test_every_kernel_has_a_configuration_for_every_target_and_element():
    for kernel, rows in configs.TABLE.items():
        for target in TARGETS.values():
            for itemsize in (2, 4):
                assert configs.choose(kernel, target, min(row.size for row in rows), itemsize).num_warps >= 1


def test_override():
    other = Config({"TILE": 8})
    with configs.override({KERNEL: other}):
        assert configs.choose(KERNEL, TARGETS["sm_80"], 64, 2) is other
        with pytest.raises(ValueError, match="expected kernels of the table, .*, got no_kernel"):
            with configs.override({"no_kernel": other}):
                pass
    assert configs.choose(KERNEL, TARGETS["sm_80"], 64, 2) is SMALL


def test_measured_configurations_are_read_on_that_gpu_only(table):
    values = {"tiles": {"TILE": 64}, "num_warps": 8, "num_stages": 3, "options": {}}
    entry = {**values, "table": configs.fingerprint(KERNEL)}
    path = tuned_tiles.write(HERE.device, {Key(KERNEL, 64, 2): entry, Key("another.kernel", 64, 2): entry})
    assert path == table / "tuned-test-gpu-9000-x.json" and [p.name for p in table.iterdir()] == [path.name]
    assert configs.choose(KERNEL, HERE, 50, 2) == Config(**values)  # the entry is for sizes up to 64
    assert configs.choose(KERNEL, HERE, 50, 4) is ANY
    assert configs.choose(KERNEL, TARGETS["sm_90"], 64, 2) is LARGE


def test_measurements_for_another_table_are_ignored(table):
    entry = {"tiles": {"TILE": 64}, "num_warps": 8, "num_stages": 3, "options": {}, "table": "of an older version"}
    tuned_tiles.write(HERE.device, {Key(KERNEL, 64, 2): entry})
    assert configs.choose(KERNEL, HERE, 50, 2) is LARGE


def test_a_cache_that_cannot_be_read_is_no_error(table, monkeypatch):
    (table / "file").write_text("")
    monkeypatch.setenv("VAR_KERNELS_CACHE", str(table / "file"))
    assert configs.choose(KERNEL, HERE, 50, 2) is LARGE


@pytest.mark.parametrize("text", ["", "[]", '{"configs": [{"kernel": "k"}]}'])
def test_a_file_that_is_not_ours_is_named(table, text):
    (table / "tuned-test-gpu-9000-x.json").write_text(text)
    with pytest.raises(ValueError, match="tuned-test-gpu-9000-x.json: expected what .* writes"):
        configs.choose(KERNEL, HERE, 64, 2)


def test_a_wrong_field_is_named(table):
    values = {"tiles": {}, "num_warps": 8, "num_stages": 3, "options": {}, "table": ""}
    path = tuned_tiles.write(HERE.device, {Key(KERNEL, 64, 2): values})
    content = json.loads(path.read_text())
    content["configs"][0]["num_warps"] = "8"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a_stem.a_kernel: num_warps: expected int, got '8'"):
        configs.choose(KERNEL, HERE, 64, 2)


def test_an_interrupted_write_leaves_the_old_file(table, monkeypatch):
    path = tuned_tiles.write(HERE.device, {})
    before = path.read_text()
    with pytest.raises(TypeError):
        tuned_tiles.write(HERE.device, {Key(KERNEL, 64, 2): {"tiles": object()}})
    assert path.read_text() == before and len(list(table.iterdir())) == 1


class Fake:
    """A problem whose time depends on the configuration. With some configurations it fails, or its result is wrong."""

    def run(self):
        self.used = configs.choose(KERNEL, HERE, 64, 2)
        if self.used.num_warps == 16:
            raise RuntimeError("out of resource: shared memory")
        wrong = self.used.num_stages == 4
        return torch.full((8,), 2.0 if wrong else 1.0), torch.arange(3)

    def seconds(self, call):
        call()
        best = {"TILE": 256}
        if self.used.num_stages == 4:
            return 1e-9  # fast but wrong
        return 1e-3 * (1 + abs(self.used.num_warps - 8) + (self.used.tiles != best))


def test_tune_climbs_past_failures_to_the_fastest_right_one(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    fake, lines = Fake(), []
    found = tune.tune([("a problem", fake.run)], HERE.device, fake.seconds, lines.append)
    expected = Config({"TILE": 256}, num_warps=8, num_stages=2)
    assert found == {Key(KERNEL, 64, 2): expected}
    assert configs.choose(KERNEL, HERE, 64, 2) == expected
    assert lines[0] == "a problem" and "6000.0 -> 1000.0 µs, TILE 256, 8 warps, 2 stages" in lines[1]
    assert "out of resource" in capsys.readouterr().err


def test_tune_keeps_the_table_where_nothing_is_faster(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    fake = Fake()
    assert tune.tune([("a problem", fake.run)], HERE.device, lambda call: (call(), 1.0)[1], lambda line: None) == {}
    assert configs.tuned_on(HERE.device) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu(capsys):
    assert tune.main([]) == 2
    assert "expected a GPU" in capsys.readouterr().err
