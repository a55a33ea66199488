"""The drawings of docs/concepts.md: `python docs/drawings.py` writes docs/drawings/*.svg.

Plain SVG on a light card, so that they read the same in either theme and on paper. ``tests/test_docs.py`` compares the
files with what this makes.
"""

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "drawings"
FONT = "font-family='DejaVu Sans, Helvetica, Arial, sans-serif'"
TASKS = (("semseg", "#2a78c8"), ("edge", "#d1621f"), ("normals", "#3f8f4f"))
INK, PALE, FROZEN, SHARED, ROUTED, OFF = "#20262e", "#8a94a0", "#dfe5ec", "#f3c14b", "#7fb2e5", "#eef1f5"


class Drawing:
    """Shapes by pixel, the origin at the top left; ``save`` makes the file."""

    def __init__(self, width, height):
        self.width, self.height, self.parts = width, height, []

    def box(self, x, y, width, height, text="", *, fill=FROZEN, line=INK, size=13, radius=5):
        """A rectangle with text in its middle; several lines are parted by newlines."""
        self.parts.append(f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='{radius}' "
                          f"fill='{fill}' stroke='{line}'/>")  # fmt: skip
        lines = text.split("\n") if text else []
        for i, each in enumerate(lines):
            self.text(x + width / 2, y + height / 2 + (i - (len(lines) - 1) / 2) * size * 1.25, each, size=size)

    def text(self, x, y, text, *, size=13, anchor="middle", color=INK):
        """Text on one line, vertically centred on ``y``."""
        self.parts.append(f"<text x='{x:g}' y='{y + size * 0.36:g}' font-size='{size}' text-anchor='{anchor}' "
                          f"fill='{color}'>{escape(text)}</text>")  # fmt: skip

    def arrow(self, *points, color=INK):
        """A line through the points with a head at the last."""
        places = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f"<polyline points='{places}' fill='none' stroke='{color}' stroke-width='1.6' "
                          f"marker-end='url(#head)'/>")  # fmt: skip

    def save(self):
        """The whole file."""
        head = ("<defs><marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' "
                f"orient='auto-start-reverse'><path d='M0,0 L10,5 L0,10 z' fill='{INK}'/></marker></defs>")  # fmt: skip
        card = f"<rect width='{self.width}' height='{self.height}' rx='10' fill='#ffffff'/>"
        body = "\n".join([head, card, *self.parts])
        return (f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width} {self.height}' "
                f"width='{self.width}' {FONT}>\n{body}\n</svg>\n")  # fmt: skip


def streams():
    """An image, its tokens, a stream per task, the blocks, the heads."""
    d = Drawing(760, 300)
    d.box(20, 115, 90, 70, "image", fill="#ffffff")
    d.arrow((110, 150), (138, 150))
    d.box(140, 115, 92, 70, "patches\nembedded\nonce")
    for i, (task, color) in enumerate(TASKS):
        y = 50 + i * 75
        d.arrow((232, 150), (252, 150), (252, y + 25), (272, y + 25))
        d.box(274, y, 100, 50, f"x + e of\n{task}", fill="#ffffff", line=color)
        for j in range(5):
            d.box(384 + j * 11, y + 18, 9, 14, fill=color, line=color, radius=1)
        d.arrow((442, y + 25), (466, y + 25), color=color)
        d.arrow((610, y + 25), (638, y + 25), color=color)
        d.box(640, y, 100, 50, f"head of\n{task}", fill="#ffffff", line=color)
    d.box(468, 36, 142, 228, fill="#f6f8fa")
    for i, (_, color) in enumerate(TASKS):
        d.box(480, 214 + i * 14, 118, 10, fill=color, line=color, radius=2)
    d.text(539, 60, "one pass", size=14)
    d.box(480, 76, 118, 40, "attention\nfrozen + LoRA", size=11)
    d.box(480, 124, 118, 40, "FFN frozen\n+ experts", size=11)
    d.text(539, 182, "all blocks")
    d.text(539, 202, "a router per task:", size=11)
    d.text(380, 284, "streams are a batch dimension: [tasks, images, tokens, width]", color=PALE)
    return d.save()


def gates():
    """Logits of eight experts, the chosen ones, one softmax, gates."""
    d = Drawing(760, 300)
    logits, k, shared = (0.3, 1.7, -0.4, 0.9, 0.1, 1.2), 2, (0.8, 1.5)
    chosen = sorted(range(len(logits)), key=lambda i: -logits[i])[:k]
    d.text(20, 34, "logits of a token", anchor="start", size=14)
    for i, logit in enumerate((*logits, *shared)):
        x, is_shared = 30 + i * 40 + (i >= len(logits)) * 22, i >= len(logits)
        fill = SHARED if is_shared else ROUTED if i in chosen else OFF
        height = 28 + 34 * (logit + 0.5)
        d.box(x, 170 - height, 30, height, fill=fill, radius=2)
        d.text(x + 15, 184, f"{logit:g}", size=11)
    d.text(150, 210, "routed: the k = 2 largest", size=12)
    d.text(333, 210, "shared: all", size=12)
    d.arrow((390, 120), (430, 120))
    d.box(432, 90, 110, 60, "one softmax\nover the active")
    d.arrow((542, 120), (580, 120))
    active = [*(logits[i] for i in chosen), *shared]
    total = sum(2.718281828**each for each in active)
    d.text(590, 34, "gates, sum 1", anchor="start", size=14)
    for i, logit in enumerate(active):
        gate = 2.718281828**logit / total
        d.box(592 + i * 40, 170 - 300 * gate, 30, 300 * gate, fill=ROUTED if i < k else SHARED, radius=2)
        d.text(607 + i * 40, 184, f"{gate:.2f}", size=11)
    d.text(380, 250, "naive sharing sets a shared expert's gate to 1; here it competes, token by token", color=PALE)
    d.text(380, 272, "inactive experts have gate 0", color=PALE)
    return d.save()


def rank_space():
    """x through the frozen linear and, beside it, through A, gates and B of all experts."""
    d = Drawing(760, 290)
    d.box(20, 115, 60, 60, "x\n[T, D]", fill="#ffffff")
    d.arrow((80, 130), (110, 130), (110, 60), (180, 60))
    d.box(182, 30, 360, 60, "frozen W  [O, D]")
    d.arrow((542, 60), (640, 60), (640, 112))
    d.arrow((80, 160), (110, 160), (110, 205), (140, 205))
    colors = (ROUTED, "#a6cbed", "#c7def4", SHARED)
    for i, color in enumerate(colors):
        name = "shared" if i == len(colors) - 1 else f"expert {i + 1}"
        d.box(142, 150 + i * 28, 110, 26, f"A of {name}", fill=color, size=11, radius=2)
        d.box(318, 150 + i * 28, 64, 26, "x gate", fill="#ffffff", size=11, radius=2)
        d.box(448, 150 + i * 28, 110, 26, f"B of {name}", fill=color, size=11, radius=2)
    d.arrow((252, 205), (316, 205))
    d.arrow((382, 205), (446, 205))
    d.arrow((558, 205), (640, 205), (640, 170))
    d.box(610, 114, 60, 54, "+", fill="#ffffff", size=18)
    d.arrow((670, 141), (700, 141))
    d.text(728, 141, "y [T, O]")
    d.text(350, 140, "rank space: [T, N r], narrow", size=11, color=PALE)
    d.text(380, 276, "two thin products for all experts, whatever their number; no loop, no sorting", color=PALE)
    return d.save()


def dispatch():
    """Two ranks: experts that travel, and tokens that travel."""
    d = Drawing(760, 310)
    for column, (name, says) in enumerate((("gather", "experts travel, each rank computes its own tokens"),
                                           ("all_to_all", "tokens travel, one gated sum comes back"))):  # fmt: skip
        left = 20 + column * 375
        d.text(left + 172, 28, name, size=15)
        for rank in range(2):
            x = left + rank * 190
            d.box(x, 50, 155, 190, fill="#f6f8fa", radius=8)
            d.text(x + 77, 68, f"rank {rank}", size=12)
            d.box(x + 15, 86, 125, 40, f"tokens of rank {rank}", fill="#ffffff", size=11)
            own, shared = (x + 82, x + 15) if rank == 0 else (x + 15, x + 82)
            d.box(own, 184, 58, 40, f"experts\n{'0-7' if rank == 0 else '8-14'}", fill=ROUTED, size=11)
            d.box(shared, 184, 58, 40, "shared", fill=SHARED, size=11)
        middle = left + 172
        start = 204 if name == "gather" else 106
        d.arrow((middle - 32, start - 7), (middle + 32, 197))
        d.arrow((middle + 32, 211), (middle - 32, start + 7))
        d.text(middle, 262, says, size=12)
    d.text(380, 292, "shared experts are on every rank; no token is dropped; auto takes what moves fewer bytes",
           color=PALE)  # fmt: skip
    return d.save()


DRAWINGS = {"streams": streams, "gates": gates, "rank_space": rank_space, "dispatch": dispatch}


def main():
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
