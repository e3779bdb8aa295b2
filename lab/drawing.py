"""The ideas in one drawing: private experts, a pool, a code that masks an FFN, two losses.

    python -m lab.drawing           # writes docs/ideas.svg, the same bytes every time

Plain strings, no library. Colours are Okabe and Ito's, which colour-blind readers tell apart; the
drawing brings its own background, so it reads on light and dark pages.
"""
import math
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "docs" / "ideas.svg"
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
INK, GREY, PALE, PAPER, PANEL = "#1f2328", "#59636e", "#d1d9e0", "#f6f8fa", "#ffffff"
LAYERS = (BLUE, ORANGE, GREEN)  # layer 1 (below), 2, 3
ON = {BLUE: PANEL, ORANGE: INK, GREEN: PANEL}  # text on these colours
WIDTH, HEIGHT = 500, 370  # of a panel


# ---- shapes: each returns one line of SVG

def text(x, y, words, size=13, fill=INK, anchor="start", weight="normal"):
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return (f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{words}</text>')


def rect(x, y, width, height, fill=PANEL, stroke=GREY, radius=4, dash=""):
    return (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" '
            f'fill="{fill}" stroke="{stroke}" stroke-dasharray="{dash}"/>')


def circle(x, y, radius, fill, stroke="none"):
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{fill}" stroke="{stroke}"/>'


def curve(x1, y1, x2, y2, colour, width):
    """A line that leaves and arrives level."""
    middle = (x1 + x2) // 2
    return (f'<path d="M{x1} {y1} C{middle} {y1} {middle} {y2} {x2} {y2}" fill="none" '
            f'stroke="{colour}" stroke-width="{width}"/>')


def arrow(x1, y1, x2, y2, colour=INK, width=2, opacity=1):
    """A line with a head of its own, in its own colour."""
    length = math.hypot(x2 - x1, y2 - y1)
    dx, dy = (x2 - x1) / length, (y2 - y1) / length
    size = 5 + 2 * width
    bx, by = x2 - size * dx, y2 - size * dy  # where the head begins
    half = size * 0.45
    corners = (f"{x2:.1f},{y2:.1f} {bx - half * dy:.1f},{by + half * dx:.1f} "
               f"{bx + half * dy:.1f},{by - half * dx:.1f}")
    return (f'<g opacity="{opacity}"><line x1="{x1}" y1="{y1}" x2="{bx:.1f}" y2="{by:.1f}" '
            f'stroke="{colour}" stroke-width="{width}"/>'
            f'<polygon points="{corners}" fill="{colour}"/></g>')


def panel(x, y, title, subtitle, shapes):
    head = [rect(0, 0, WIDTH, HEIGHT, PANEL, PALE, radius=10),
            text(20, 32, title, 18, weight="bold"), text(20, 53, subtitle, 13, GREY)]
    return [f'<g transform="translate({x} {y})">', *head, *shapes, "</g>"]


# ---- 1 and 2: who owns the experts

def routers():
    """The stream of one token, upwards through three layers, each with its router."""
    shapes = [arrow(58, 338, 58, 72, PALE, 5), text(44, 352, "one token", 12, GREY)]
    for i, colour in enumerate(LAYERS):
        y = 288 - 88 * i
        shapes += [circle(58, y, 6, colour), curve(64, y, 92, y, colour, 2),
                   rect(92, y - 16, 84, 32, colour, colour, radius=6),
                   text(134, y + 5, f"router {i + 1}", 14, ON[colour], "middle", "bold")]
    return shapes


def expert_y(i):
    """Middle of the box of expert 1 to 12: four to a layer, the first at the bottom."""
    return 318 - 19 * (i - 1) - 12 * ((i - 1) // 4)


def expert_boxes(chosen):
    """Twelve experts; chosen: {expert: colours of the layers that use it}."""
    shapes = []
    for i in range(1, 13):
        y, colours = expert_y(i) - 8, chosen.get(i, ())
        for n, colour in enumerate(colours):
            part = 92 // len(colours)
            shapes.append(rect(300 + n * part, y, part, 17, colour, colour, radius=3))
        if not colours:
            shapes.append(rect(300, y, 92, 17, PAPER, PALE, radius=3))
        ink = ON[colours[0]] if len(colours) == 1 else GREY
        if len(colours) < 2:
            shapes.append(text(346, y + 13, f"expert {i}", 12, ink, "middle"))
        else:  # two layers meet here: half a box each
            shapes.append(text(323, y + 13, "expert", 12, ON[colours[0]], "middle"))
            shapes.append(text(369, y + 13, f"{i}", 12, ON[colours[1]], "middle"))
    return shapes


def choices(pairs):
    """Two lines from each router, as thick as their gates. pairs: the experts of layers 1 to 3."""
    shapes = []
    for i, experts in enumerate(pairs):
        for expert, width in zip(experts, (4, 2)):
            shapes.append(curve(176, 288 - 88 * i, 300, expert_y(expert), LAYERS[i], width))
    return shapes


def private_banks():
    shapes = routers() + choices([(2, 4), (5, 7), (12, 10)])
    for i, colour in enumerate(LAYERS):
        shapes.append(rect(288, 247 - 88 * i, 116, 84, "none", colour, radius=8))
        shapes.append(text(416, 295 - 88 * i, f"layer {i + 1}'s", 13, GREY))
    chosen = {2: [BLUE], 4: [BLUE], 5: [ORANGE], 7: [ORANGE], 10: [GREEN], 12: [GREEN]}
    return shapes + expert_boxes(chosen)


def one_pool():
    shapes = routers() + choices([(2, 7), (7, 4), (11, 2)])
    shapes.append(rect(288, 71, 116, 260, "none", INK, radius=8))
    for i, words in enumerate(("one pool", "for all", "layers")):
        shapes.append(text(416, 190 + 18 * i, words, 13, GREY))
    chosen = {2: [BLUE, GREEN], 7: [BLUE, ORANGE], 4: [ORANGE], 11: [GREEN]}
    return shapes + expert_boxes(chosen)


# ---- 3: a code that masks an FFN

SCORES = (  # of 16 neurons for two codes z, in percent of the largest
    (18, 72, 35, 10, 90, 22, 64, 30, 12, 41, 100, 8, 25, 38, 15, 20),
    (30, 20, 45, 14, 78, 36, 16, 92, 40, 24, 60, 18, 100, 12, 34, 28))
KEPT = 4  # 25 % of them


def kept(scores):
    return {j for j, score in enumerate(scores) if score >= sorted(scores)[-KEPT]}


def neuron_x(j):
    return 248 + 15 * j


def code_space():
    """A Gaussian in the space of codes, and two samples."""
    shapes = [rect(20, 92, 152, 152, PAPER, PALE, radius=8)]
    for radius, opacity in ((62, 0.12), (42, 0.18), (22, 0.26)):
        shapes.append(f'<ellipse cx="92" cy="164" rx="{radius}" ry="{radius * 0.7:.1f}" '
                      f'fill="{BLUE}" opacity="{opacity}" transform="rotate(-28 92 164)"/>')
    return [*shapes, circle(92, 164, 3, INK), text(98, 180, "μ(x)", 12),
            circle(122, 130, 6, ORANGE), text(132, 128, "z₁", 14),
            circle(58, 196, 6, GREEN), text(40, 216, "z₂", 14),
            text(96, 262, "router: z ~ N(μ(x), Σ(x))", 12, INK, "middle"),
            text(96, 82, "space of experts", 12, GREY, "middle")]


def masked_ffn():
    shapes = code_space()
    for n, (scores, colour) in enumerate(zip(SCORES, (ORANGE, GREEN))):
        base = 138 + 68 * n
        shapes.append(text(186, base - 10, f"mask {n + 1}", 13, INK))
        for j, score in enumerate(scores):
            height = score * 0.46
            fill = colour if j in kept(scores) else PALE
            shapes.append(f'<rect x="{neuron_x(j) - 5}" y="{base - height:.1f}" width="10" '
                          f'height="{height:.1f}" fill="{fill}"/>')
        shapes.append(f'<line x1="240" y1="{base}" x2="481" y2="{base}" stroke="{GREY}"/>')
    shapes += [text(360, 82, "the largest N % of W_z z keep their value", 12, GREY, "middle"),
               text(186, 242, "mean", 13)]
    both = [kept(scores) for scores in SCORES]
    for j in range(16):
        colours = [c for c, mask in zip((ORANGE, GREEN), both) if j in mask]
        shapes.append(circle(neuron_x(j), 238, 6, colours[0] if colours else PAPER,
                             "none" if colours else PALE))
        if len(colours) == 2:  # right half in the other colour
            shapes.append(f'<path d="M{neuron_x(j)} 232 a6 6 0 0 1 0 12 z" fill="{colours[1]}"/>')
    return shapes + ffn_line()


def ffn_line():
    """x through W_1, the masked neurons, W_2, to y."""
    steps = ((40, 38, "x"), (130, 62, "W₁ x"), (300, 102, "act · mask"), (412, 54, "W₂"))
    shapes = []
    for x, width, words in steps:
        fill = "#fff4dc" if "mask" in words else PAPER
        shapes += [rect(x - width // 2, 292, width, 30, fill, GREY, radius=6),
                   text(x, 312, words, 14, INK, "middle")]
    for x1, x2 in ((59, 98), (161, 248), (351, 384), (439, 466)):
        shapes.append(arrow(x1, 307, x2, 307, GREY, 1.5))
    shapes.append(arrow(300, 252, 300, 290, GREY, 1.5))
    return [*shapes, text(476, 312, "y", 14, INK, "middle"),
            text(250, 350, "y = W₂ (act(W₁ x) · mean of the masks): K samples, one FFN", 13,
                 INK, "middle")]


# ---- 4: two losses

def specialization():
    shapes = [text(20, 88, "specialization", 15, weight="bold"),
              text(20, 107, "activations of the experts", 12, GREY),
              text(20, 123, "that one token chose", 12, GREY)]
    x, y = 50, 286
    shapes += [arrow(x, y, 155, 184, BLUE, 3, 0.3), arrow(x, y, 178, 214, VERMILION, 3, 0.3),
               arrow(x, y, 62, 150, BLUE, 3), arrow(x, y, 194, 272, VERMILION, 3)]
    turns = (("M126 176 A 124 124 0 0 0 84 156", 84, 156, 74, 152),
             ("M184 226 A 138 138 0 0 1 192 250", 192, 250, 194, 260))
    for d, x1, y1, x2, y2 in turns:
        shapes.append(f'<path d="{d}" fill="none" stroke="{GREY}" stroke-width="1.5" '
                      f'stroke-dasharray="4 3"/>')
        shapes.append(arrow(x1, y1, x2, y2, GREY, 1))
    return [*shapes, text(40, 162, "a₁", 15, BLUE, weight="bold"),
            text(200, 286, "a₂", 15, VERMILION, weight="bold"),
            text(122, 326, "mean cos(a₁, a₂)²", 14, INK, "middle"),
            text(122, 347, "pushes them to right angles", 12, GREY, "middle")]


def coupling():
    left, right, ys = 306, 436, [166, 200, 234, 268]
    shapes = [text(266, 88, "coupling", 15, weight="bold"),
              text(266, 107, "experts of two layers", 12, GREY),
              text(266, 123, "on a token's way", 12, GREY)]
    for a in ys:
        shapes += [curve(left + 22, a, right - 22, b, PALE, 1.5) for b in ys]
    shapes += [curve(left + 22, ys[1], right - 22, ys[2], GREEN, 6),
               curve(left + 22, ys[3], right - 22, ys[0], ORANGE, 6)]
    for x, n in ((left, "l"), (right, "l+1")):
        shapes.append(text(x, 148, f"layer {n}", 12, GREY, "middle"))
        for i, y in enumerate(ys):
            used = {(left, 1): GREEN, (right, 2): GREEN, (left, 3): ORANGE, (right, 0): ORANGE}
            fill = used.get((x, i), PAPER)
            shapes.append(rect(x - 22, y - 12, 44, 24, fill, fill if fill != PAPER else PALE))
    return [*shapes, text(371, 326, "- Σ w s_e s_v of the chosen", 14, INK, "middle"),
            text(371, 347, "w = 1, or how often a path is used", 12, GREY, "middle")]


def two_losses():
    line = f'<line x1="246" y1="78" x2="246" y2="346" stroke="{PALE}"/>'
    return [*specialization(), line, *coupling()]


def drawing():
    """The whole picture as one string."""
    panels = (
        (16, 16, "Private experts", "Switch, top-k, DeepSeek: each layer chooses among its own",
         private_banks()),
        (532, 16, "One pool through the depth", "UniPool: each layer routes, all share the experts",
         one_pool()),
        (16, 402, "A code masks one wide FFN", "infinity-MoE: every point z is an expert",
         masked_ffn()),
        (532, 402, "Two losses that make experts differ",
         "small terms beside the cross-entropy", two_losses()))
    width, height = 2 * WIDTH + 48, 2 * HEIGHT + 48
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             f'font-family="Helvetica, Arial, sans-serif">',
             "<title>Private experts, a shared pool, a code that masks an FFN, two losses</title>",
             rect(0, 0, width, height, PAPER, PAPER, radius=12)]
    for x, y, title, subtitle, shapes in panels:
        lines += panel(x, y, title, subtitle, shapes)
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(drawing(), encoding="utf-8")
    print(f"wrote {TARGET}")
