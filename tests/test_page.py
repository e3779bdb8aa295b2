"""The page to look at routing: what it holds is what the model did; Chromium draws that."""
import base64
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from probe_helpers import ROUTED, hf_model, random_model, tokens

from support import page, routers
from support.page import collect, write_page
from support.tokenizer import get_tokenizer

BASE = dict(arch="llama", n_layer=4)
OURS = {
    "topk": BASE | dict(flavour="topk", n_experts=6, d_expert=24),
    "deepseek": BASE | dict(flavour="deepseek", n_experts=6, moe_every=2),  # layers 1 and 3 only
    "unipool": BASE | dict(flavour="unipool", n_experts=3, top_k=2),  # many gates are zero
    "pools": BASE | dict(flavour="unipool", n_experts=12, pool_groups=2),
}
BYTES = get_tokenizer("bytes")


def text_ids(length=21):
    return tokens(1, length)[0]


# ---- 1. Discrete experts

@pytest.mark.parametrize("name", OURS)
def test_collect_is_what_the_model_did(name):
    model, ids = random_model(**OURS[name]).train(), text_ids()
    got = collect(model, BYTES, ids, name)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    with torch.no_grad():
        out = model.eval()(ids[None, :-1], return_routings=True)
    expected = F.cross_entropy(out.logits[0], ids[1:], reduction="none")
    assert got["loss"] == pytest.approx(expected.tolist(), abs=6e-4)
    assert got["layers"] == model.config.moe_layers() and got["experts"] == model.config.n_experts
    zeros = 0
    for routing, chosen, gates in zip(out.routings, got["ids"], got["gates"], strict=True):
        assert chosen == routing.ids.tolist()
        gates = torch.tensor(gates) / 1000
        assert torch.equal(gates == 0, routing.weights == 0)
        torch.testing.assert_close(gates, routing.weights, atol=1e-3, rtol=0)
        zeros += (gates == 0).sum().item()
    assert (zeros > 0) == (name == "unipool")
    banks = {"unipool": [0, 0, 0, 0], "pools": [0, 0, 1, 1], "topk": [0, 1, 2, 3]}
    assert got["banks"] == banks.get(name, [0, 1])
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize("name", ["topk", "unipool"])
def test_losses_under_random_routing(name):
    """Each layer's row against the whole model, with that layer's choices drawn."""
    model, ids = random_model(**OURS[name]), text_ids()
    got = collect(model, BYTES, ids, name)
    for k, layer in enumerate(routers.find_layers(model)):
        draw = page.random_choice(layer)
        changed = lambda _, args, own, draw=draw: own._replace(ids=draw(None, args, own).ids)
        handle = layer.router.register_forward_hook(changed)
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0]
        handle.remove()
        losses = F.cross_entropy(logits, ids[1:], reduction="none")
        assert got["random"][k] == pytest.approx(losses.tolist(), abs=6e-4)
        assert got["random"][k] != got["loss"]
    assert collect(model, BYTES, ids, name) == got  # fixed seed


@pytest.mark.parametrize("family", sorted(ROUTED))
def test_models_of_transformers(family):
    model, ids = hf_model(family), text_ids()
    got = collect(model, None, ids, family, use_cache=False)
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0]
    expected = F.cross_entropy(logits, ids[1:], reduction="none")
    assert got["loss"] == pytest.approx(expected.tolist(), abs=6e-4)
    assert got["layers"] == ([1] if family in ("deepseek_v2", "deepseek_v3") else [0, 1])
    assert got["experts"] == 6 and np.shape(got["ids"]) == (len(got["layers"]), 20, 2)
    assert got["tokens"][3] == f"#{ids[3]}" and got["next"] == f"#{ids[20]}"
    assert all(row != got["loss"] for row in got["random"])
    if family == "mixtral":  # its choice is the top 2 of its own logits
        with torch.no_grad():
            scores = model(ids[None, :-1], output_router_logits=True).router_logits
        best = [s.topk(2).indices.tolist() for s in scores]
        assert got["ids"] == best


@pytest.mark.filterwarnings("error")
def test_tokens_may_be_a_read_only_array():
    model, ids = random_model(**OURS["topk"]), text_ids()
    array = ids.numpy().astype(np.uint16)
    array.flags.writeable = False
    assert collect(model, BYTES, array, "x") == collect(model, BYTES, ids, "x")


def test_dense_models_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="no router"):
        collect(random_model(arch="llama"), BYTES, text_ids(), "dense")
    with pytest.raises(ValueError, match=r"shape \(1, 5\)"):
        collect(random_model(**OURS["topk"]), BYTES, tokens(1, 5), "two dimensions")


# ---- 2. Infinity-MoE

INFMOE = BASE | dict(flavour="infmoe", infmoe_dz=8)


def unpacked(got, k, n_samples):
    stride = -(-len(got["shown"]) // 8)
    data = np.frombuffer(base64.b64decode(got["masks"][k]), np.uint8).reshape(-1, n_samples, stride)
    return np.unpackbits(data, axis=-1)[..., :len(got["shown"])].astype(bool)


@pytest.mark.parametrize("few", [False, True])
def test_masks_and_overlap(few, monkeypatch):
    """Against sets of neurons, counted one by one."""
    if few:
        monkeypatch.setattr(page, "MODEL_BYTES", 3070)  # room for 16 neurons
    model, ids = random_model(**INFMOE), text_ids()
    got = collect(model, BYTES, ids, "infmoe")
    with torch.no_grad():
        out = model(ids[None, :-1], return_routings=True)
    assert got["neurons"] == 80 and len(got["shown"]) == (16 if few else 80)
    assert got["shown"][0] == 0 and got["shown"][-1] == 79
    for k, (codes, (_, bank)) in enumerate(zip(out.routings, model.expert_layers())):
        scores = codes[0].z @ bank.w_z["0"].T  # (n, K, F)
        sets = [[set(s.topk(20).indices.tolist()) for s in token] for token in scores]
        expected = [[[f in s for f in got["shown"]] for s in token] for token in sets]
        assert np.array_equal(unpacked(got, k, 2), expected)
        share = [len(a & b) / len(a | b) for a, b in sets]
        assert got["own"][k] == pytest.approx([100 * s for s in share], abs=0.51)
        for t, d in itertools.product(range(20), range(1, 7)):
            value = got["overlap"][k][t][d - 1]
            if t + d >= 20:
                assert value is None
                continue
            share = [len(a & b) / len(a | b) for a in sets[t] for b in sets[t + d]]
            assert value == pytest.approx(100 * np.mean(share), abs=0.51)
        assert got["chance"][k] == 14  # a quarter on: 1/16 in both, 7/16 in either
    assert all(row != got["loss"] for row in got["random"])


@pytest.mark.parametrize("settings", [
    dict(infmoe_mean=True),  # one mask, no overlap within a token
    dict(infmoe_depth=2, infmoe_rate=(None, 0.25)),  # the first hidden layer is dense
    dict(infmoe_depth=2, infmoe_z="shared"),
    dict(pool_groups=1),
])
def test_other_continuous_models(settings):
    model = random_model(**INFMOE | settings)
    got = collect(model, BYTES, text_ids(), "infmoe")
    samples = 1 if settings.get("infmoe_mean") else 2
    on = unpacked(got, 0, samples)
    assert (on.sum(-1) == 20).all()  # a quarter of 80
    assert (got["own"][0] is None) == (samples == 1)
    assert got["banks"] == ([0] * 4 if settings.get("pool_groups") else [0, 1, 2, 3])


# ---- 3. Tokens as text

def test_spelling_of_bytes():
    ids = BYTES.encode("a</script>é\n")
    spelled = page.spell(BYTES, [*ids, BYTES.eot])
    assert spelled == [*"a</script>", "\\xc3", "\\xa9", "\n", "<|endoftext|>"]


# ---- 4. The file

def made_up(n_layers, n_experts, top_k, n=96):
    """As collect returns it, of the largest model that the page is meant for."""
    rng = np.random.default_rng(0)
    shape = n_layers, n, top_k
    return {
        "name": "x", "tokens": [f" token{t}" for t in range(n)], "next": "</script>",
        "layers": list(range(n_layers)), "banks": [0] * n_layers, "experts": n_experts,
        "ids": rng.integers(0, n_experts, shape).tolist(),
        "gates": rng.integers(0, 2000, shape).tolist(),
        "loss": rng.random(n).round(3).tolist(),
        "random": (10 * rng.random((n_layers, n))).round(3).tolist()}


def test_size_and_nothing_from_outside(tmp_path):
    path = tmp_path / "new" / "page.html"
    write_page(path, [made_up(24, 192, 2), made_up(24, 64, 2)])
    assert path.stat().st_size <= 300_000
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"//[a-z]|@import|url\(|src=|fetch\(|XMLHttp", html, re.I)
    assert "default-src 'none'" in html and html.count("</script>") == 2


def test_size_of_two_wide_infinity_moes(tmp_path):
    """24 layers of 6144 neurons, 4 samples: fewer neurons are shown."""
    class Bank:
        def masks(self, codes):
            return [torch.rand(96, 4, 6144) > 0.75]

    rest = {name: made_up(24, 1, 1)[name] for name in ("name", "tokens", "next", "layers", "banks",
                                                       "loss", "random")}
    layers = [routers.Layer(i, None, None, Bank(), 6144, 4) for i in range(24)]
    one = rest | page.neurons(layers, [None] * 24)
    write_page(tmp_path / "page.html", [one, one])
    assert (tmp_path / "page.html").stat().st_size <= 300_000
    assert len(one["shown"]) > 30


def test_models_must_have_read_the_same_text(tmp_path):
    other = made_up(2, 4, 1)
    other["tokens"] = [*other["tokens"][:-1], "!"]
    with pytest.raises(ValueError, match="did not read the same tokens") as error:
        write_page(tmp_path / "page.html", [made_up(2, 4, 1), other])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_page(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, [made_up(2, 4, 1)])
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_page(path, [made_up(2, 4, 1) | {"loss": [float("nan")] * 96}])
    (tmp_path / "page.html.tmp").mkdir()  # writing fails after all else went well
    with pytest.raises(OSError):
        write_page(path, [made_up(2, 8, 1)])
    assert path.read_bytes() == before


# ---- 5. In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


def browse(path, tmp_path, width=1280):
    """-> the page's elements after its scripts ran, and what the console said."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--v=0", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
         "--virtual-time-budget=3000", "--dump-dom", f"file://{path}"],
        capture_output=True, text=True, timeout=240)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console


def with_script(path, script):
    """A copy of the page with another script at its end: what a reader's hands would do."""
    copy = path.with_name("played.html")
    copy.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    return copy


def drawn_experts(dom):
    """For each model the sorted (layer, expert, is its gate zero?) that its grid shows."""
    pattern = r'data-layer="(\d+)" data-expert="(\d+)" data-gate="([\d.]+)"'
    return [sorted((int(layer), int(expert), float(gate) == 0)
                   for layer, expert, gate in re.findall(pattern, article))
            for article in dom.split("<article")[1:]]


def chosen_experts(routings, layers, t):
    return sorted((layer, expert, gate == 0) for layer, routing in zip(layers, routings)
                  for expert, gate in zip(routing.ids[t].tolist(), routing.weights[t].tolist()))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pool against private experts on a text that tries to break out; what each routed."""
    text = b'x</script><script>console.log("out")</script><!-- &lt; "\n\t  \xe2\x82\xac'
    ids = torch.tensor(list(text))
    path = tmp_path_factory.mktemp("page") / "page.html"
    pages, said = [], []
    for name in ("unipool", "deepseek"):
        model = random_model(**OURS[name] | dict(block_size=96))
        pages.append(collect(model, BYTES, ids, f"<b>{name}</b>"))
        with torch.no_grad():
            out = model(ids[None, :-1], return_routings=True)
        said.append((out.routings, model.config.moe_layers()))
    write_page(path, pages)
    return path, pages, said


@needs_chromium
def test_what_is_shown_of_a_token(pair, tmp_path):
    path, pages, said = pair
    script = "change({ token: 5, layers: models.map((m, i) => m.layers.indexOf(2 + i)) })"
    dom, console = browse(with_script(path, script), tmp_path)
    assert not console
    assert drawn_experts(dom) == [chosen_experts(*model, 5) for model in said]
    assert "&lt;b&gt;unipool&lt;/b&gt;" in dom and "<b>unipool</b>" not in dom.split("<main")[1]
    for one, layer in zip(pages, (2, 3)):  # the loss under random routing of that layer
        random = np.mean(one["random"][one["layers"].index(layer)])
        assert f"with layer {layer} choosing at random {random:.2f}" in dom
    assert dom.count("no expert") > 0


@needs_chromium
def test_a_click_and_a_key_select_a_token(pair, tmp_path):
    path, _, said = pair
    played = with_script(path, """
        boxes[7].click();
        boxes[7].focus();
        boxes[7].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
        document.querySelector(".cards button.mine").click();
        document.title = document.activeElement.title + " marks " + state.expert;""")
    dom, console = browse(played, tmp_path)
    assert not console
    assert drawn_experts(dom) == [chosen_experts(*model, 8) for model in said]
    title = re.search("<title>(.*?)</title>", dom)[1]
    expert = re.search(r"^token 8: .* marks 0\.0\.(\d+)", title)
    assert expert, title
    # underlined are the tokens on which that expert of the pool works, in any layer
    routings, _ = said[0]
    works = sum(((r.ids == int(expert[1])) & (r.weights > 0)).any(-1) for r in routings) > 0
    boxes = re.search('<div class="text".*?</div>', dom, re.S)[0].split("<button")[1:]
    assert ["pinned" in box for box in boxes] == works.tolist()
    assert 0 < sum(works) < len(works)
    assert [re.search('aria-pressed="(.*?)"', box)[1] for box in boxes].index("true") == 8


@needs_chromium
def test_neurons_in_the_browser(tmp_path):
    got = collect(random_model(**INFMOE), BYTES, text_ids(), "infmoe")
    write_page(tmp_path / "page.html", [got])
    played = with_script(tmp_path / "page.html", "change({ token: 9 })")
    dom, console = browse(played, tmp_path)
    assert not console
    found = re.findall(r'fill-opacity="([\d.]+)" data-layer="(\d+)" data-neuron="(\d+)"', dom)
    drawn = {(int(k), int(f)): float(opacity) for opacity, k, f in found}
    expected = {(k, f): on / 2 for k in range(4)
                for f, on in enumerate(unpacked(got, k, 2)[9].sum(0).tolist())}
    assert drawn == expected
    overlaps = re.findall(r"<td[^>]*>(\d+)</td>", dom)
    before = [got["overlap"][0][9 - d][d - 1] for d in range(6, 0, -1)]
    row = [*before, got["own"][0][9], *got["overlap"][0][9]]
    assert [int(v) for v in overlaps[:13]] == row


@needs_chromium
@pytest.mark.parametrize("width", [1280, 600])
def test_wide_grids_scroll_and_the_page_does_not(width, tmp_path):
    write_page(tmp_path / "page.html", [made_up(24, 192, 2), made_up(24, 64, 2)])
    played = with_script(tmp_path / "page.html", """
        const box = document.querySelector(".box"), page = document.documentElement;
        document.title = [page.scrollWidth, innerWidth, box.scrollWidth, box.clientWidth,
                          box.tabIndex];""")
    dom, console = browse(played, tmp_path, width=width)
    assert not console
    page_is, page_has, box_is, box_has, tab = map(
        int, re.search("<title>(.*?)</title>", dom)[1].split(","))
    assert page_is <= page_has == width
    assert box_is > 1500 > box_has and tab == 0  # and keys can scroll it


@needs_chromium
def test_the_console_is_heard(pair, tmp_path):
    """What the tests above rely on: a mistake in the script would be reported."""
    _, console = browse(with_script(pair[0], "nothing.there()"), tmp_path)
    assert any("nothing is not defined" in line for line in console)
