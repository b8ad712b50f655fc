"""Tuning of Triton's kernels: off, it is not there; on, it times every candidate once, keeps the fastest, and changes
nothing but the tiles. A fake stopwatch says what is fastest; every candidate runs in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from attention_cases import FEATURES, Case
from attention_cases import check as check_attention
from devices import device_for
from layer_norm_cases import check as check_norm
from layer_norm_cases import make_inputs

import fastattn
from fastattn.ops import attention_triton_tiles as tiles
from fastattn.ops import int8_matmul_triton_launch as int8
from fastattn.ops import layer_norm_triton_launch as norms
from fastattn.ops import triton_autotune
from fastattn.ops.triton_launch import Device

pytestmark = pytest.mark.skipif(
    fastattn.available_backends()["triton"] is not None, reason=f"no triton: {fastattn.available_backends()['triton']}"
)
DEVICE = device_for("triton")
CAPABILITIES = [(8, 0), (9, 0), (10, 0)]


class Stopwatch:
    """Takes the place of the timing: the ``winner``-th candidate (of fewer: the last) is fastest."""

    def __init__(self) -> None:
        self.winner, self.times = 0, []

    def __call__(self, launch, on):
        launch()
        self.times.append(len(self.times))
        return 0.0 if len(self.times) == self.winner + 1 else 1.0


@pytest.fixture
def stopwatch(monkeypatch, tmp_path):
    """Tuning is on, knows nothing yet, and keeps what it learns in a directory of this test."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_autotune, "_known", {})
    watch = Stopwatch()
    monkeypatch.setattr(triton_autotune, "_milliseconds", watch)
    fastattn.set_autotune(True)
    yield watch
    fastattn.set_autotune(False)


def choose(choices=(3, 1, 2), key="key", default=3, launched=None, on=None):
    """``fastest`` of numbers, for a kernel that is not there."""
    launched = [] if launched is None else launched
    on = torch.empty(0, device=DEVICE) if on is None else on
    kernel = SimpleNamespace(__name__="kernel", cache_key="source")
    return triton_autotune.fastest(kernel, key, choices, default, lambda choice: lambda: launched.append(choice), on)


# --- Choosing --------------------------------------------------------------------------------------------------------


def test_the_fastest_is_chosen_once_for_each_key(stopwatch):
    stopwatch.winner, launched = 1, []
    assert [choose(launched=launched), choose(launched=launched)] == [1, 1]
    assert launched == [3, 1, 2]
    stopwatch.winner = 3
    assert choose(key="other", launched=launched) == 3  # the stopwatch goes on counting: its fourth is this key's first
    assert choose() == 1 and len(launched) == 6


def test_the_disk_is_asked_once(stopwatch, monkeypatch):
    choose()
    monkeypatch.setattr(triton_autotune, "_name_on_disk", None)
    choose()


def test_results_outlive_the_process(stopwatch, monkeypatch):
    stopwatch.winner = 2
    assert choose() == 2
    monkeypatch.setattr(triton_autotune, "_known", {})
    assert choose() == 2 and len(stopwatch.times) == 3
    # Other candidates, or another source, are another question.
    assert choose(choices=(3, 1, 2, 5)) != 2 and len(stopwatch.times) == 7


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fastest": 3}', '{"fastest": "0"}', '{"fastest": -1}'])
def test_a_damaged_result_is_measured_again(stopwatch, monkeypatch, tmp_path, text):
    choose()
    (path,) = tmp_path.rglob("*autotune.json")
    path.write_text(text)
    monkeypatch.setattr(triton_autotune, "_known", {})
    stopwatch.times.clear()
    stopwatch.winner = 1
    assert choose() == 1 and len(stopwatch.times) == 3


@pytest.mark.parametrize("broken", ["no directory", "read-only"])
def test_a_disk_that_takes_nothing_is_a_warning(stopwatch, monkeypatch, tmp_path, broken):
    """As where HOME is read-only: the launch goes on, and the process keeps what it found."""
    from triton.runtime.cache import FileCacheManager

    def refuse(*arguments, **options):
        raise PermissionError("read-only file system")

    if broken == "read-only":
        monkeypatch.setattr(FileCacheManager, "put", refuse)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    stopwatch.winner = 1
    with pytest.warns(UserWarning, match="results are not kept on disk, and hold for this process alone"):
        assert choose() == 1
    assert choose() == 1 and len(stopwatch.times) == 3


def test_a_single_candidate_is_not_timed(stopwatch):
    assert choose(choices=(7,)) == 7 and not stopwatch.times


def test_a_captured_graph_takes_what_is_known_or_the_default(stopwatch, monkeypatch):
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert choose(on=gpu, default=2) == 2 and not stopwatch.times
    capturing, stopwatch.winner = False, 1
    assert choose(on=gpu) == 1
    capturing = True
    assert choose(on=gpu) == 1


def test_deterministic_algorithms_take_the_table(stopwatch):
    assert triton_autotune.is_on()
    torch.use_deterministic_algorithms(True)
    assert not triton_autotune.is_on()


def test_off_nothing_is_asked(monkeypatch):
    def touched(*_):
        raise AssertionError("the tuner was asked although it is off")

    monkeypatch.setattr(triton_autotune, "fastest", touched)
    monkeypatch.setattr(triton_autotune, "_milliseconds", touched)
    attend_normalize_and_multiply()
    fastattn.set_autotune(True)
    try:
        with pytest.raises(AssertionError, match="was asked"):
            attend_normalize_and_multiply()
    finally:
        fastattn.set_autotune(False)


# --- What the ops do with it -----------------------------------------------------------------------------------------


def attend_normalize_and_multiply() -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    out, lse = fastattn.attention(q, k, v, is_causal=True, return_lse=True, backend="triton")
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    x, weight = torch.randn(40, 96, device=DEVICE, requires_grad=True), torch.ones(96, device=DEVICE)
    y = fastattn.layer_norm(x, 96, weight.requires_grad_(), backend="triton")
    y_gradients = torch.autograd.grad(y, (x, weight), y)
    a = torch.randint(-9, 9, (20, 48), dtype=torch.int8, device=DEVICE)
    scale = torch.ones(20, device=DEVICE)
    product = fastattn.int8_matmul(a, a, scale, scale, backend="triton")
    linear = fastattn.int8_linear(x[:5, :48].detach(), a, scale, backend="triton")
    return [out, lse, *gradients, y, *y_gradients, product, linear]


def test_every_op_tunes_each_of_its_kernels_once(stopwatch, monkeypatch):
    asked = []
    fastest = triton_autotune.fastest

    def recorded(kernel, key, choices, *rest):
        asked.append((kernel.__name__, chosen := fastest(kernel, key, choices, *rest), choices))
        return chosen

    expected = [tensor.clone() for tensor in attend_normalize_and_multiply()]
    known = dict(triton_autotune._known)
    timed = len(stopwatch.times)
    monkeypatch.setattr(triton_autotune, "fastest", recorded)
    actual = attend_normalize_and_multiply()
    assert [name for name, _, _ in asked] == [
        "attention_fwd_kernel", "attention_dkdv_kernel", "attention_dq_kernel", "row_fwd_kernel", "row_bwd_kernel",
        "int8_matmul_kernel", "int8_linear_kernel",
    ]  # fmt: skip
    assert timed == sum(len(choices) for _, _, choices in asked) > len(asked)
    assert len(stopwatch.times) == timed and triton_autotune._known == known
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_lengths_of_one_power_of_two_share_a_result(stopwatch):
    def attend(seqlen):
        q = torch.randn(1, 1, seqlen, 16, device=DEVICE)
        fastattn.attention(q, q, q, backend="triton")
        return len(stopwatch.times)

    timed = attend(40)
    assert attend(64) == attend(33) == timed
    assert attend(65) > timed


@pytest.mark.parametrize("winner", [0, 1, 2])
def test_the_winner_is_what_runs(stopwatch, monkeypatch, winner):
    """Of each kernel, whichever candidate wins; what the trials left behind does not show."""
    from fastattn.ops import attention_triton_tuning as tuning

    ran = []
    run_all = tuning._run_all
    monkeypatch.setattr(tuning, "_run_all", lambda launches, on: (ran.append(launches), run_all(launches, on)))
    case = Case(batch=1, heads=1, seqlen_q=70, seqlen_k=70, head_dim=16, options={"is_causal": True})
    choices = tuning._INTERPRETED
    assert len(choices) == 3
    stopwatch.winner = winner
    q = torch.randn(1, 1, 70, 16, device=DEVICE)
    fastattn.attention(q, q, q, backend="triton")
    tile = choices[winner][0]
    assert ran[-1][-1].arguments["BLOCK_Q"] == tile.block_q and ran[-1][-1].arguments["BLOCK_K"] == tile.block_k
    check_attention(case, torch.float32, "triton")


# --- Every candidate gives right numbers -----------------------------------------------------------------------------


def _tilings() -> list[tuple[tuple[tuple[int, int], ...], ...]]:
    """(block_q, block_k) of the launches of a forward, a dq, a dk and dv: each of the candidates in one of them."""
    from fastattn.ops import attention_triton_tuning as tuning

    kernels = ("attention_fwd_kernel", "attention_dq_kernel", "attention_dkdv_kernel")
    found: list[set] = [set(), set(), set()]
    for capability in CAPABILITIES:
        for block_d in (64, 128, 256):
            for features in (0, 1):
                for shapes, kernel in zip(found, kernels, strict=True):
                    given = tiles.Gpu(capability), kernel, torch.float16, block_d, features
                    shapes.update(tuple(tile[:2] for tile in tiling) for tiling in tuning.tilings(*given))
    longest = max(map(len, found))
    return list(zip(*((sorted(shapes) * longest)[:longest] for shapes in found), strict=True))


TILINGS = [] if pytestmark.args[0] else _tilings()


@pytest.mark.parametrize("shapes", TILINGS, ids=str)
def test_attention_in_every_candidate(shapes, monkeypatch):
    forward, dq, dkdv = (tuple(tiles.Tile(*shape, 4, 1) for shape in tiling) for tiling in shapes)
    for name, tiling in (("forward", forward), ("dq", dq), ("dkdv", dkdv)):
        monkeypatch.setattr(tiles, name, lambda *_, tiling=tiling: tiling)
    # Tiles cut on either side and by the ends, dropout, and two heads that share keys.
    case = FEATURES["everything"]
    small = {"batch": 1, "heads": 2, "heads_kv": 1, "seqlen_q": 150, "seqlen_k": 140, "head_dim": 16}
    check_attention(Case(**{**vars(case), **small}), torch.float32, "triton")


TMA_OPTIONS = {
    "plain": {},
    "causal_bottom_right": {"is_causal": True, "alignment": "bottom_right"},
    "window": {"window": (20, 9)},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", TMA_OPTIONS.values(), ids=TMA_OPTIONS)
def test_keys_by_tma_give_the_same_bits(options, dtype, monkeypatch):
    """Also where neither length nor head_dims fill tiles, and behind the keys lies what must not be read."""
    q = torch.randn(2, 4, 45, 40, device=DEVICE).to(dtype)
    k, v = (torch.full((2, 80, 2, head_dim), float("nan"), device=DEVICE, dtype=dtype) for head_dim in (40, 24))
    k, v = (x[:, :70].copy_(torch.randn(x[:, :70].shape)).transpose(1, 2) for x in (k, v))
    results = []
    for tma in (False, True):
        monkeypatch.setattr(tiles, "forward", lambda *_, tma=tma: (tiles.Tile(32, 32, 4, 1, tma=tma),))
        torch.manual_seed(3)
        results.append(fastattn.attention(q, k, v, enable_gqa=True, return_lse=True, backend="triton", **options))
    assert all(map(torch.equal, *results)) and results[0][0].isfinite().all()


def test_tma_is_tried_where_the_hardware_can_read_the_operands():
    from fastattn.ops import attention_triton_plan as plan
    from fastattn.ops import attention_triton_tuning as tuning

    def tried(capability, dtype=torch.float16, head_dim=64, softcap=0.0, padding=0):
        gpu, scoring = tiles.Gpu(capability), plan.Scoring(*[None] * 4, 0.0, True, 0.1, -1, -1, False, softcap)
        q = torch.empty(1, 2, 512, head_dim + padding, dtype=dtype, device="meta")[..., :head_dim]
        launch = plan.plan_forward(q, q, q, q, torch.empty(1, 2, 512, device="meta"), scoring, None, gpu)[-1]
        found = tuning.candidates(gpu, launch)
        assert not found[0][0].tma
        return any(tile.tma for (tile,) in found)

    assert tried((9, 0)) and tried((10, 0), torch.bfloat16, 128) and tried((9, 0), padding=8)
    assert not tried((8, 0)) and not tried((12, 0)) and not tried((9, 0), torch.float32)
    assert not tried((9, 0), head_dim=20) and not tried((9, 0), padding=4) and not tried((9, 0), softcap=3.0)


NORM_DEVICES = [Device(2, (8, 0), 163 << 10), Device(132, (9, 0), 227 << 10)]


@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm"])
@pytest.mark.parametrize(("rows", "cols"), [(70, 60), (70, 700)], ids=str)
def test_norms_in_every_candidate(op, rows, cols, monkeypatch):
    fwd, bwd = (
        sorted({tile for device in NORM_DEVICES for tile in candidates(rows, cols, device)})
        for candidates in (norms.fwd_candidates, norms.bwd_candidates)
    )
    assert len(fwd) > 2 and len(bwd) > 1
    longest = max(len(fwd), len(bwd))
    for fwd_tile, bwd_tile in zip((fwd * longest)[:longest], (bwd * longest)[:longest], strict=True):
        monkeypatch.setattr(norms, "fwd_tile", lambda *_, tile=fwd_tile: tile)
        monkeypatch.setattr(norms, "bwd_tile", lambda *_, tile=bwd_tile: tile)
        check_norm(op, make_inputs(op, (rows, cols), torch.bfloat16), "triton")


@pytest.mark.parametrize("rows", [3, 20, 60, 200])
def test_int8_in_every_candidate_gives_the_same_bits(rows, monkeypatch):
    a, b = (torch.randint(-127, 128, (n, 300), dtype=torch.int8, device=DEVICE) for n in (rows, 150))
    a_scale, b_scale = torch.rand(rows, device=DEVICE), torch.rand(150, device=DEVICE)
    x = torch.randn(rows, 300, device=DEVICE)
    expected = fastattn.int8_matmul(a, b, a_scale, b_scale, backend="triton")
    expected_linear = fastattn.int8_linear(x, b, b_scale, backend="triton")
    choices = int8.candidates(rows, NORM_DEVICES[1])
    assert len(choices) > 1
    for tile in choices:
        monkeypatch.setattr(int8, "matmul_tile", lambda *_, tile=tile: tile)
        assert torch.equal(fastattn.int8_matmul(a, b, a_scale, b_scale, backend="triton"), expected)
        assert torch.equal(fastattn.int8_linear(x, b, b_scale, backend="triton"), expected_linear)
