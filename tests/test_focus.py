"""The focus sets are the definition's: F_i = S_i ∪ C, exact, stratified, deterministic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import bin_and_frame

from litefocus import LiteFocusConfig, focus_set
from litefocus.focus import FreqAxis

grids = st.tuples(st.integers(1, 40), st.integers(1, 9))
ratios = st.one_of(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]), st.floats(0, 1))
axes = st.sampled_from(["width", "height"])


@given(grids, ratios, axes, st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_every_set_is_its_own_bin_and_an_equal_share_of_every_other(grid, ratio, axis, seed) -> None:
    num_frames, freq_bins = grid
    focus = focus_set(num_frames, freq_bins, LiteFocusConfig.paper(sparse_ratio=ratio, seed=seed), freq_axis=axis)
    sampled = 0 if ratio == 0 else max(1, round(ratio * num_frames))
    frames_of_bin: dict[int, set[int]] = {}  # what the sample took from each bin

    assert sorted(focus.queries.flatten().tolist()) == list(range(num_frames * freq_bins))
    assert focus.queries.flatten()[focus.inverse].tolist() == list(range(num_frames * freq_bins))
    for queries, keys in zip(focus.queries.tolist(), focus.keys.tolist(), strict=True):
        assert len(set(keys)) == len(keys) == focus.keys_per_query
        (own,) = {bin_and_frame(query, num_frames, freq_bins, axis)[0] for query in queries}
        seen: dict[int, set[int]] = {}
        for key in keys:
            key_bin, frame = bin_and_frame(key, num_frames, freq_bins, axis)
            seen.setdefault(key_bin, set()).add(frame)
        assert seen.pop(own) == set(range(num_frames))
        assert len(seen) == (freq_bins - 1 if sampled else 0)
        for key_bin, frames in seen.items():
            assert len(frames) == sampled
            assert frames_of_bin.setdefault(key_bin, frames) == frames  # one sample, the same for all queries


@given(grids, ratios.filter(bool), axes)
@settings(max_examples=50, deadline=None)
def test_without_same_frequency_all_queries_share_a_sample_of_every_bin(grid, ratio, axis) -> None:
    num_frames, freq_bins = grid
    config = LiteFocusConfig.paper(same_frequency=False, sparse_ratio=ratio)
    focus = focus_set(num_frames, freq_bins, config, freq_axis=axis)
    sampled = max(1, round(ratio * num_frames))
    assert focus.queries.shape == (1, num_frames * freq_bins)
    assert focus.queries.flatten()[focus.inverse].tolist() == list(range(num_frames * freq_bins))
    (keys,) = focus.keys.tolist()
    assert len(set(keys)) == len(keys)
    per_bin = [bin_and_frame(key, num_frames, freq_bins, axis)[0] for key in keys]
    assert [per_bin.count(f) for f in range(freq_bins)] == [sampled] * freq_bins


@given(
    num_frames=st.integers(60, 400),
    freq_bins=st.integers(1, 4),
    time_window=st.one_of(st.sampled_from([1, 2, 128, 129, 256]), st.integers(1, 300)),
    ratio=ratios,
    same=st.booleans(),
    axis=axes,
)
@settings(max_examples=60, deadline=None)
def test_time_windows_by_their_definition(num_frames, freq_bins, time_window, ratio, same, axis) -> None:
    config = LiteFocusConfig.paper(same_frequency=same or ratio == 0, sparse_ratio=ratio, time_window=time_window)
    focus = focus_set(num_frames, freq_bins, config, freq_axis=axis)
    half = (time_window + 1) // 2
    assert focus.queries.flatten()[focus.inverse].tolist() == list(range(num_frames * freq_bins))
    group_of = (focus.inverse // focus.queries.shape[1]).tolist()
    seen = [{} for _ in focus.keys]  # frames of each bin, for every group
    for frames_of_bin, keys in zip(seen, focus.keys.tolist(), strict=True):
        assert len(set(keys)) == len(keys) == focus.keys_per_query
        for key in keys:
            key_bin, frame = bin_and_frame(key, num_frames, freq_bins, axis)
            frames_of_bin.setdefault(key_bin, set()).add(frame)
    for token in range(num_frames * freq_bins):
        own, frame = bin_and_frame(token, num_frames, freq_bins, axis)
        frames_of_bin = seen[group_of[token]]
        others = {f: frames for f, frames in frames_of_bin.items() if not config.same_frequency or f != own}
        assert len({len(frames) for frames in others.values()}) <= 1
        if not config.same_frequency:
            reach = 2 * half + max(64, half)
            frames = set().union(*others.values())
            assert max(frames) - min(frames) < (num_frames if reach >= num_frames else reach)
            if reach < num_frames:
                assert frame - reach < min(frames)
                assert max(frames) < frame + reach
            continue
        window = frames_of_bin[own]
        first, last = min(window), max(window)
        assert window == set(range(first, last + 1))
        assert first <= max(0, frame - half)
        assert last >= min(num_frames - 1, frame + half)
        assert len(window) <= max(64, half) + 2 * half
        sampled = 0 if ratio == 0 else max(1, round(ratio * len(window)))
        assert all(
            len(frames) == sampled and first <= min(frames) and max(frames) <= last for frames in others.values()
        )
        assert len(others) == (freq_bins - 1 if sampled else 0)


def test_a_clip_no_longer_than_its_window_is_not_cut() -> None:
    for num_frames, time_window in [(192, 128), (64, 1), (300, 10**9)]:
        plain, windowed = (focus_set(num_frames, 3, LiteFocusConfig.paper(time_window=w)) for w in (None, time_window))
        assert torch.equal(plain.queries, windowed.queries)
        assert torch.equal(plain.keys, windowed.keys)
    assert focus_set(193, 3, LiteFocusConfig.paper(time_window=128)).keys.shape == (3 * 4, 192 + 2 * 19)


def test_with_a_time_window_cost_is_linear_in_the_clip() -> None:
    config = LiteFocusConfig.paper(time_window=128)
    pairs = {n: focus_set(n, 8, config).keys_per_query * n * 8 for n in (1024, 2048, 8192)}
    assert pairs[2048] == 2 * pairs[1024]
    assert pairs[8192] == 8 * pairs[1024]
    assert focus_set(1024, 8, config).keys_per_query == 325
    wide = focus_set(4096, 8, LiteFocusConfig.paper(time_window=512))  # blocks of half a window
    assert wide.queries.shape == (8 * 16, 256)
    assert wide.keys.shape == (8 * 16, 768 + 7 * 77)


@pytest.mark.parametrize("freq_axis", ["width", "height"])
def test_groups_of_one_block_follow_each_other(freq_axis: FreqAxis) -> None:
    """So that the keys they share are in the processor's cache."""
    focus = focus_set(200, 3, LiteFocusConfig(time_window=16), freq_axis=freq_axis)
    blocks = (focus.queries // 3 if freq_axis == "width" else focus.queries % 200).view(4, 3, 64)
    assert (blocks == torch.tensor([0, 64, 128, 136])[:, None, None] + torch.arange(64)).all()


def test_blocks_without_same_frequency_sample_their_own_window() -> None:
    """Every frame of a window is in reach: at ratio 1 the sample is the window."""
    config = LiteFocusConfig.paper(same_frequency=False, sparse_ratio=1, time_window=20)
    focus = focus_set(150, 2, config)
    windows = [(0, 83), (54, 137), (66, 149)]  # blocks at 0, 64 and 86, ten frames on either side, clamped
    for keys, (first, last) in zip(focus.keys.tolist(), windows, strict=True):
        assert sorted({key // 2 for key in keys}) == list(range(first, last + 1))


def test_without_cross_frequency_only_the_own_bin_is_left() -> None:
    focus = focus_set(5, 3, LiteFocusConfig.paper(cross_frequency=False))
    assert focus.keys.tolist() == focus.queries.tolist() == [[f + 3 * t for t in range(5)] for f in range(3)]


def test_size_at_80_seconds_is_the_papers() -> None:
    focus = focus_set(1024, 8, LiteFocusConfig.paper())
    assert (focus.tokens, focus.keys_per_query) == (8192, 1738)
    assert focus.queries.dtype == focus.keys.dtype == focus.inverse.dtype == torch.int32


def test_draws_are_pinned() -> None:
    """Equal in every process, on every machine and in every release: a change here changes everybody's audio."""
    for layer, keys in (
        ("", [[0, 2, 4, 6, 8, 10, 1, 7], [1, 3, 5, 7, 9, 11, 4, 10]]),
        ("up", [[0, 2, 4, 6, 8, 10, 5, 7], [1, 3, 5, 7, 9, 11, 2, 10]]),
    ):
        assert focus_set(6, 2, LiteFocusConfig.paper(sparse_ratio=0.34), layer=layer).keys.tolist() == keys
    config = LiteFocusConfig(time_window=16, min_sampled=2, sparse_ratio=0.01, far_sampled=2)
    for sample, keys in (
        (0, [[13, 211, 92, 128, 297, 372, 316, 439, 245, 389], [285, 417, 232, 349, 57, 132, 76, 199, 5, 149]]),
        (5, [[88, 166, 47, 203, 258, 438, 274, 400, 311, 350], [240, 372, 307, 424, 18, 198, 34, 160, 71, 110]]),
    ):
        of_first_and_last_group = focus_set(150, 3, config, layer="up", sample=sample).keys[[0, -1]]
        assert of_first_and_last_group[:, 80:].tolist() == keys


def test_depends_on_seed_layer_and_length_alone() -> None:
    def keys(num_frames: int = 50, seed: int = 0, layer: str = "a") -> list[list[int]]:
        return focus_set(num_frames, 4, LiteFocusConfig.paper(seed=seed), layer=layer).keys.tolist()

    assert keys() == keys()
    assert keys() != keys(seed=1)
    assert keys() != keys(layer="b")
    sampled_at_50 = {key for key in keys()[0] if key % 4}
    assert not sampled_at_50 <= {key for key in keys(num_frames=51)[0] if key % 4}


def test_leaves_the_global_random_state_alone_and_ignores_it() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    keys = focus_set(30, 4, LiteFocusConfig.paper()).keys
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(focus_set(30, 4, LiteFocusConfig.paper()).keys, keys)


def test_is_built_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        focus = focus_set(20, 3, LiteFocusConfig.paper())
    assert torch.equal(focus.keys, focus_set(20, 3, LiteFocusConfig.paper()).keys)
    assert focus.to("meta").keys.device.type == "meta"


def test_every_frame_is_as_likely_as_every_other() -> None:
    num_frames, draws = 20, 2000
    counts = torch.zeros(num_frames)
    for seed in range(draws):
        focus = focus_set(num_frames, 2, LiteFocusConfig.paper(sparse_ratio=0.25, seed=seed))
        counts[focus.keys[0, num_frames:] // 2] += 1
    expected = 0.25 * draws
    deviation = (draws * 0.25 * 0.75) ** 0.5
    assert counts.sum() == draws * 5
    assert (counts - expected).abs().max() < 4.5 * deviation


# --- weights: what the paper leaves out


def strata(num_frames: int, freq_bins: int, axis: str, windows: list[tuple[int, int, range]]) -> torch.Tensor:
    """(tokens, tokens): 0 where key j is in query i's own bin and window, 1 in the window, 2 outside, 3 there, own bin.

    windows: (first, last) frame and the frames of the queries that share it, one after the other; later ones win.
    """
    place = [bin_and_frame(token, num_frames, freq_bins, axis) for token in range(num_frames * freq_bins)]
    bins, frames = (torch.tensor(column) for column in zip(*place, strict=True))
    first, last = torch.zeros_like(frames), torch.zeros_like(frames)
    for low, high, queries in windows:
        here = (frames >= queries.start) & (frames < queries.stop)
        first[here], last[here] = low, high
    inside = (frames >= first[:, None]) & (frames <= last[:, None])
    own = bins == bins[:, None]
    return torch.where(inside, torch.where(own, 0, 1), torch.where(own, 3, 2))


@pytest.mark.parametrize("axis", ["width", "height"])
@pytest.mark.parametrize(("same", "cross"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("time_window", [None, 20])
def test_weights_make_every_pair_count_once_on_average(time_window, same, cross, axis) -> None:
    """Horvitz-Thompson: the mean of weight x membership is 1 for every pair that can be drawn, whatever its stratum."""
    num_frames, freq_bins, draws, c, m = 150, 3, 500, 9, 7
    windows = [(0, 149, range(150))]  # blocks of 64 at 0, 64 and 86, ten frames on either side, clamped to the clip
    if time_window:
        windows = [(0, 83, range(64)), (54, 137, range(64, 128)), (66, 149, range(128, 150))]
    n = windows[0][1] + 1
    total = torch.zeros(num_frames * freq_bins, num_frames * freq_bins, dtype=torch.float64)
    for seed in range(draws):
        config = LiteFocusConfig(
            same_frequency=same,
            cross_frequency=cross,
            sparse_ratio=0.01,
            min_sampled=c,
            time_window=time_window,
            far_sampled=m,
            seed=seed,
        )
        focus = focus_set(num_frames, freq_bins, config, freq_axis=axis)
        assert (focus.log_weights is None) == (not time_window and not cross)
        weights = torch.ones(focus.keys_per_query) if focus.log_weights is None else focus.log_weights.exp()
        counted = torch.zeros(len(focus.keys), focus.tokens, dtype=torch.float64)
        counted.scatter_(1, focus.keys, weights.double().expand(len(focus.keys), -1))
        total += counted[focus.inverse // focus.queries.shape[1]]
    pairs = strata(num_frames, freq_bins, axis, windows)
    far = (num_frames - n) / m
    weight = torch.tensor([1.0, n / c, far, far], dtype=torch.float64)[pairs]
    if not same:
        weight[pairs == 0] = n / c
    drawn = pairs.new_tensor([True, cross, cross, True], dtype=torch.bool)[pairs]
    assert not total[~drawn].any()
    deviation = ((total / draws - 1).abs() / ((weight - 1) / draws).sqrt().clamp(min=1e-7))[drawn]
    assert deviation.max() < 5.5  # standard errors, of up to 200,000 pairs


def test_a_floor_on_the_sample_and_never_more_than_there_is() -> None:
    """c = max(min_sampled, r T), at most T."""
    for num_frames, sampled in [(1000, 50), (320, 16), (100, 16), (16, 16), (5, 5)]:
        config = LiteFocusConfig(time_window=None)
        focus = focus_set(num_frames, 2, config)
        assert focus.keys_per_query == num_frames + sampled
        if sampled == num_frames:
            assert focus.log_weights is None
        else:
            # strata are of this many frames, and one more where they do not come out even
            whole = num_frames // sampled
            assert set(focus.log_weights.exp().round().tolist()) <= {1, whole, whole + (num_frames % sampled > 0)}
            assert focus.log_weights[num_frames:].exp().sum() == pytest.approx(num_frames)
    assert focus_set(100, 2, LiteFocusConfig(sparse_ratio=0)).keys_per_query == 100  # no sample, no floor
    assert focus_set(100, 2, LiteFocusConfig(reweight=False)).log_weights is None
    assert focus_set(100, 2, LiteFocusConfig(same_frequency=False, min_sampled=20)).log_weights is None  # equal: cancel


@pytest.mark.parametrize("num_frames", [7500, 15000])
@pytest.mark.parametrize(("time_window", "freq_bins", "window"), [(128, 8, 192), (64, 4, 128), (32, 2, 96)])
def test_the_default_at_ten_minutes(time_window: int, freq_bins: int, window: int, num_frames: int) -> None:
    """At every length n own + 16 (F - 1) + 16 F keys, a multiple of 16, over which fused attention takes least time."""
    focus = focus_set(num_frames, freq_bins, LiteFocusConfig(time_window=time_window))
    sampled = (freq_bins - 1, 16), (freq_bins, 16)
    assert focus.keys_per_query == window + sum(bins * frames for bins, frames in sampled)
    assert focus.keys_per_query % 16 == 0
    own, near, far = focus.log_weights.exp().split([window, *(bins * frames for bins, frames in sampled)])
    assert own.unique().tolist() == [1]
    assert near.view(-1, 16).sum(dim=1).tolist() == pytest.approx([window] * (freq_bins - 1))
    assert far.view(-1, 16).sum(dim=1).tolist() == pytest.approx([num_frames - window] * freq_bins)


def test_weights_are_the_lengths_of_the_stretches_in_their_order() -> None:
    config = LiteFocusConfig(time_window=16, far_sampled=3, min_sampled=3, sparse_ratio=0.01)
    weights = focus_set(180, 2, config).log_weights.exp()  # 80 frames of a window, 100 outside of it
    assert weights.tolist() == pytest.approx([1] * 80 + [26, 27, 27] + 2 * [33, 33, 34])


def test_a_far_sample_is_never_more_than_there_is() -> None:
    focus = focus_set(390, 2, LiteFocusConfig())  # six frames outside of the window
    assert focus.keys_per_query == 384 + 19 + 2 * 6
    assert all(len(set(keys)) == len(keys) for keys in focus.keys.tolist())
    assert not focus.log_weights[-12:].any()


def test_a_sample_has_a_frame_of_every_stretch_of_the_clip() -> None:
    focus = focus_set(1000, 2, LiteFocusConfig(sparse_ratio=0.025, min_sampled=0, time_window=96, far_sampled=8))
    frames = focus.keys.view(2, -1, focus.keys_per_query) // 2  # (bins, blocks, keys): 160 own, 4 of the other bin, far
    first = frames[..., :1]
    near, far = frames[..., 160:164], frames[..., 164:].unflatten(-1, (2, 8))
    assert ((near - first) // 40 == torch.arange(4)).all()
    beyond = far - 160 * (far >= first[..., None] + 160)  # counted without the window
    assert (beyond // 105 == torch.arange(8)).all()
    assert (beyond == beyond[:, :1]).all()  # one draw for all blocks, so that those near each other err alike


@pytest.mark.parametrize("axis", ["width", "height"])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("layer", ["a", "b", "c"])
def test_bins_and_samples_share_a_stretch_out(layer: str, far: bool, axis: FreqAxis) -> None:
    """Ten stretches of 16 frames: each of 8 bins has two frames of its own, and four samples are four frames apart."""
    config = LiteFocusConfig(same_frequency=False, min_sampled=10, sparse_ratio=0.01)
    if far:  # outside of the first block's window of 80 frames
        config = LiteFocusConfig(time_window=16, far_sampled=10, min_sampled=5, sparse_ratio=0.01)
    num_frames = 240 if far else 160
    frames = []
    for sample in range(8):
        keys = focus_set(num_frames, 8, config, layer=layer, freq_axis=axis, sample=sample).keys[0, -80:].view(8, 10)
        frames.append(keys // 8 if axis == "width" else keys % num_frames)
        assert ((frames[-1] % 16 // 2).sort(dim=0).values == torch.arange(8)[:, None]).all()
    offsets = (torch.stack(frames) - frames[0]) % 16
    assert offsets.flatten(1).unique(dim=1).squeeze().tolist() == [0, 8, 4, 12, 2, 10, 6, 14]


def test_blocks_bins_stretches_and_layers_draw_places_of_their_own() -> None:
    """Of neighbours along each of them, few have the same part of a stretch, or the same place in their parts."""
    config = LiteFocusConfig(same_frequency=False, time_window=40_000, min_sampled=50, sparse_ratio=1e-9, far_sampled=0)
    keys = torch.stack([focus_set(100_000, 8, config, layer=layer).keys.view(5, 8, 50) for layer in "ab"])
    windows = torch.tensor([0, 0, 20_000, 40_000, 40_000])  # of 60,000 frames, in 50 stretches of 1200
    place = (keys // 8 - windows[:, None, None]) % 1200
    for what in (place // 150, place % 150 // 15):
        for dim in range(4):
            same = what.narrow(dim, 0, what.shape[dim] - 1) == what.narrow(dim, 1, what.shape[dim] - 1)
            assert same.float().mean() < 0.3


def test_sets_grow_with_the_clip_alone() -> None:
    def size(num_frames: int) -> int:
        focus = focus_set(num_frames, 8, LiteFocusConfig(time_window=256))
        return focus.queries.nbytes + focus.keys.nbytes + focus.inverse.nbytes

    assert size(90_000) < 12.5 * size(7_500) < 8 * 2**20 * 12.5


def test_draws_of_a_layer_differ_and_share_everything_else() -> None:
    first, second = (focus_set(50, 4, layer="a", sample=sample) for sample in (0, 1))
    assert torch.equal(first.keys, focus_set(50, 4, layer="a").keys)
    assert not torch.equal(first.keys, second.keys)
    assert torch.equal(first.queries, second.queries)
    assert torch.equal(first.log_weights, second.log_weights)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_frames": 0, "freq_bins": 8}, ValueError, "num_frames must be an integer of at least 1, got 0"),
        ({"num_frames": 8, "freq_bins": -1}, ValueError, "freq_bins must be an integer of at least 1, got -1"),
        ({"num_frames": 8.5, "freq_bins": 8}, TypeError, r"num_frames must be an integer .* got 8.5 \(float\)"),
        ({"num_frames": 8, "freq_bins": 8, "sample": -1}, ValueError, "sample must be .* of at least 0, got -1"),
        ({"num_frames": 8, "freq_bins": 8, "freq_axis": "heigth"}, ValueError, "'heigth'. Did you mean 'height'?"),
    ],
)
def test_refuses(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        focus_set(**arguments)
