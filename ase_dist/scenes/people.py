"""People: a skeleton posed by joint angles, dressed in round cones and ellipsoids with PASCAL-Part's names.

The body is built for a height of 1.75 m and scaled. It faces -z (the viewer), stands on y = 0, and its left hand is
on the viewer's right (+x).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ase_dist.scenes.classes import CONTEXT, VOC
from ase_dist.scenes.materials import Material, Rgb, pick
from ase_dist.scenes.solids import Array, Primitive, Thing, Vector, ellipsoid, frustum, round_cone, turn

SKINS: tuple[Rgb, ...] = (
    (0.96, 0.80, 0.69), (0.90, 0.72, 0.58), (0.80, 0.60, 0.45), (0.63, 0.44, 0.32), (0.45, 0.30, 0.22),
    (0.34, 0.22, 0.16),
)  # fmt: skip
HAIRS: tuple[Rgb, ...] = (
    (0.12, 0.09, 0.08), (0.22, 0.14, 0.09), (0.40, 0.25, 0.14), (0.70, 0.52, 0.28), (0.55, 0.25, 0.12),
    (0.62, 0.60, 0.58),
)  # fmt: skip
CLOTHES: tuple[Rgb, ...] = (
    (0.80, 0.18, 0.17), (0.15, 0.30, 0.62), (0.92, 0.90, 0.86), (0.14, 0.14, 0.16), (0.18, 0.48, 0.32),
    (0.93, 0.74, 0.20), (0.55, 0.25, 0.50), (0.88, 0.48, 0.20), (0.45, 0.66, 0.80), (0.62, 0.62, 0.62),
    (0.86, 0.52, 0.58), (0.30, 0.22, 0.16),
)  # fmt: skip
TROUSERS: tuple[Rgb, ...] = (
    (0.20, 0.27, 0.42), (0.32, 0.42, 0.58), (0.13, 0.13, 0.15), (0.55, 0.47, 0.36), (0.34, 0.33, 0.32),
    (0.80, 0.76, 0.68), (0.30, 0.34, 0.24),
)  # fmt: skip
SHOES: tuple[Rgb, ...] = ((0.10, 0.09, 0.09), (0.88, 0.87, 0.85), (0.36, 0.22, 0.13), (0.60, 0.15, 0.15))


@dataclass
class Limb:
    """Angles of a limb in radians: ``swing`` forward, ``spread`` outward, ``bend`` of the joint, ``twist`` inward."""

    swing: float = 0.0
    spread: float = 0.06
    bend: float = 0.08
    twist: float = 0.0


@dataclass
class Pose:
    """Joint angles of a body; ``drop`` lowers the hips by metres (of a body of 1.75 m), ``lean`` bends it forward."""

    arms: tuple[Limb, Limb] = field(default_factory=lambda: (Limb(), Limb()))
    legs: tuple[Limb, Limb] = field(default_factory=lambda: (Limb(), Limb()))
    lean: float = 0.0
    head_yaw: float = 0.0
    head_pitch: float = 0.0
    drop: float = 0.0


@dataclass(frozen=True)
class Clothes:
    """Materials of a dressed body and the cut of its clothes."""

    skin: Material
    face: Material
    hair: Material
    shirt: Material
    trousers: Material
    shoes: Material
    sleeves: str  # none, short, long
    legs: str  # long, short, skirt
    haircut: str  # short, long, bun, bald, cap
    build: float  # girth, 1 is slim


def standing(rng: np.random.Generator) -> Pose:
    """Upright, arms hanging, on the hips, waving, folded or holding something up."""
    arms = [
        Limb(float(rng.normal(0, 0.12)), float(rng.uniform(0.08, 0.25)), float(rng.uniform(0.1, 0.5))) for _ in "lr"
    ]
    kind = rng.integers(6)
    if kind == 0:
        arms[int(rng.integers(2))] = Limb(0.3, float(rng.uniform(2.2, 2.7)), float(rng.uniform(0.2, 0.9)), -0.2)
    elif kind == 1:
        arms = [Limb(-0.35, 0.75, 1.75, 1.15), Limb(-0.35, 0.75, 1.75, 1.15)]
    elif kind == 2:
        arms = [Limb(0.35, 0.2, 1.7, 0.75), Limb(0.3, 0.2, 1.8, 0.85)]
    elif kind == 3:
        arms[int(rng.integers(2))] = Limb(float(rng.uniform(0.7, 1.4)), 0.1, float(rng.uniform(0.4, 1.2)), 0.2)
    stance = float(rng.uniform(0.03, 0.16))
    legs = (Limb(0.03, stance, 0.05), Limb(float(rng.uniform(-0.12, 0.12)), stance, float(rng.uniform(0.02, 0.2))))
    return Pose((arms[0], arms[1]), legs)


def walking(rng: np.random.Generator) -> Pose:
    """In mid-step, arms against the legs; a long stride with bent elbows is running."""
    stride = float(rng.uniform(0.25, 0.65))
    phase = 1.0 if rng.random() < 0.5 else -1.0
    bend = 0.3 + max(0.0, stride - 0.45) * 5
    arms = (Limb(-phase * stride * 0.9, 0.14, bend), Limb(phase * stride * 0.9, 0.14, bend))
    legs = tuple(
        Limb(sign * phase * stride, 0.03, 0.12 if sign * phase > 0 else 0.35 + stride * 0.8) for sign in (1, -1)
    )
    return Pose(arms, (legs[0], legs[1]), lean=0.05 + 0.18 * stride)


def sitting(rng: np.random.Generator) -> Pose:
    """On a seat: thighs level, hands on the lap or one raised."""
    arms = [Limb(float(rng.uniform(0.3, 0.55)), 0.14, float(rng.uniform(0.7, 1.0)), 0.25) for _ in "lr"]
    if rng.random() < 0.3:
        arms[int(rng.integers(2))] = Limb(0.4, 0.3, 2.1, 0.1)
    legs = tuple(Limb(1.5, float(rng.uniform(0.05, 0.22)), float(rng.uniform(1.35, 1.6))) for _ in "lr")
    return Pose((arms[0], arms[1]), (legs[0], legs[1]), lean=float(rng.uniform(-0.15, 0.1)))


def crouching(rng: np.random.Generator) -> Pose:
    """Squatting, arms on the knees."""
    arms = (Limb(0.9, 0.15, 0.6, 0.2), Limb(0.8, 0.2, 0.8, 0.2))
    return Pose(arms, (Limb(1.7, 0.25, 2.2), Limb(1.55, 0.25, 2.15)), lean=0.35)


POSES = {"standing": standing, "walking": walking, "sitting": sitting, "crouching": crouching}


def dress(rng: np.random.Generator) -> Clothes:
    """Skin, hair and clothes drawn at random."""
    skin, hair = pick(rng, SKINS, 0.03), pick(rng, HAIRS, 0.03)
    shirt, second = pick(rng, CLOTHES), pick(rng, CLOTHES)
    pattern, scale = (("plain", 1.0), ("fabric", 2.0), ("stripes", 0.09), ("plaid", 0.1), ("pinstripes", 0.05),
                      ("dots", 0.07), ("plain", 1.0), ("logo", 0.22))[int(rng.integers(8))]  # fmt: skip
    if pattern == "fabric":
        second = (shirt[0] * 0.8, shirt[1] * 0.8, shirt[2] * 0.8)
    trousers = pick(rng, TROUSERS)
    darker = (trousers[0] * 0.8, trousers[1] * 0.8, trousers[2] * 0.8)
    eyes = (skin[0] * 0.28, skin[1] * 0.2, skin[2] * 0.18)
    return Clothes(
        skin=Material(skin),
        face=Material(skin, eyes, "face"),
        hair=Material(hair, (hair[0] * 0.6, hair[1] * 0.6, hair[2] * 0.6), "fur", 2.0, 0.12),
        shirt=Material(shirt, second, pattern, scale),
        trousers=Material(trousers, darker, "fabric", 3.0),
        shoes=Material(pick(rng, SHOES), gloss=0.15),
        sleeves=("short", "long", "long", "none", "short")[int(rng.integers(5))],
        legs=("long", "long", "long", "short", "skirt")[int(rng.integers(5))],
        haircut=("short", "short", "long", "long", "bun", "cap", "bald")[int(rng.integers(7))],
        build=float(rng.uniform(0.95, 1.22)),
    )


def person(rng: np.random.Generator, *, pose: str = "standing", height: float = 1.75) -> Thing:
    """A dressed person of ``height`` metres in one of the POSES; a sitting one has its hips over its position."""
    body = Body(dress(rng), POSES[pose](rng), height / 1.75)
    thing = Thing("person", VOC["person"], CONTEXT["person"], radius=0.32, height=height)
    thing.add(*body.shapes())
    return thing


class Body:
    """Turns a pose into shapes: joints first, from the hips outwards, then flesh and clothes round them."""

    def __init__(self, clothes: Clothes, pose: Pose, scale: float) -> None:
        self.clothes, self.pose, self.scale = clothes, pose, scale
        upright = max(abs(leg.swing) for leg in pose.legs) < 0.9
        self.legs = "short" if clothes.legs == "skirt" and not upright else clothes.legs
        self.lean = turn(pitch=-pose.lean)
        self.joints = self._joints()

    def _joints(self) -> dict[str, Array]:
        """Every joint in metres of the unscaled body, lifted so that the lower foot stands on y = 0."""
        joints: dict[str, Array] = {"hips": np.zeros(3, np.float32)}
        for name, x, y in (("chest", 0.0, 0.36), ("throat", 0.0, 0.53), ("head", 0.0, 0.69)):
            joints[name] = self.lean @ np.array([x, y, 0.0], np.float32)
        for side, sign, arm, leg in zip("lr", (1.0, -1.0), self.pose.arms, self.pose.legs, strict=True):
            joints[side + "shoulder"] = self.lean @ np.array([sign * 0.185, 0.475, 0.0], np.float32)
            upper, lower = _limb_directions(arm, sign, elbow=True)
            joints[side + "elbow"] = joints[side + "shoulder"] + self.lean @ upper * np.float32(0.29)
            joints[side + "wrist"] = joints[side + "elbow"] + self.lean @ lower * np.float32(0.25)
            joints[side + "hand"] = joints[side + "wrist"] + self.lean @ lower * np.float32(0.09)
            joints[side + "hip"] = np.array([sign * 0.095, -0.03, 0.0], np.float32)
            upper, lower = _limb_directions(leg, sign, elbow=False)
            joints[side + "knee"] = joints[side + "hip"] + upper * np.float32(0.43)
            joints[side + "ankle"] = joints[side + "knee"] + lower * np.float32(0.40)
        floor = min(float(joints[side + "ankle"][1]) for side in "lr") - 0.085
        return {name: point - np.array([0.0, floor, 0.0], np.float32) for name, point in joints.items()}

    def shapes(self) -> list[Primitive]:
        """All shapes, scaled."""
        shapes = [*self._torso(), *self._head()]
        for side in "lr":
            shapes += [*self._arm(side), *self._leg(side)]
        return shapes

    def _at(self, name: str, offset: Vector = (0.0, 0.0, 0.0)) -> Vector:
        return self._scaled(self.joints[name] + self.lean @ np.array(offset, np.float32))

    def _scaled(self, point: Array) -> Vector:
        x, y, z = point * self.scale
        return float(x), float(y), float(z)

    def _cone(self, start: Vector, end: Vector, radii: tuple[float, float], material: Material, part: str,
              *, flat: float = 1.0) -> Primitive:  # fmt: skip
        side = (1.0, 0.0, 0.0)
        return round_cone(
            start, end, (radii[0] * self.scale, radii[1] * self.scale), material, flat=flat, side=side, part=part
        )

    def _torso(self) -> list[Primitive]:
        c, girth = self.clothes, self.clothes.build
        belly = self._cone(self._at("hips", (0, 0.10, 0)), self._at("chest"), (0.138 * girth, 0.165), c.shirt, "torso",
                           flat=0.62 * girth)  # fmt: skip
        # The yoke lies across, so its stripes run the other way in its own frame.
        crossed = {"stripes": "pinstripes", "pinstripes": "stripes", "logo": "plain"}
        across = crossed.get(c.shirt.pattern, c.shirt.pattern)
        yoke = round_cone(
            self._at("lshoulder", (-0.045, -0.008, 0)), self._at("rshoulder", (0.045, -0.008, 0)),
            (0.068 * self.scale, 0.068 * self.scale), c.shirt._replace(pattern=across),
            side=(0.0, 1.0, 0.0), part="torso",
        )  # fmt: skip
        slope = self._cone(self._at("chest", (0, 0.02, 0)), self._at("throat", (0, -0.03, 0)), (0.15, 0.06), c.shirt,
                           "torso", flat=0.6)  # fmt: skip
        pelvis = self._cone(self._at("hips", (-0.055, 0.01, 0)), self._at("hips", (0.055, 0.01, 0)),
                            (0.107 * girth, 0.107 * girth), c.trousers, "torso")  # fmt: skip
        neck = self._cone(self._at("throat", (0, -0.04, 0)), self._at("head", (0, -0.06, 0.01)), (0.056, 0.05), c.skin,
                          "neck")  # fmt: skip
        return [belly, yoke, slope, pelvis, neck]

    def _head(self) -> list[Primitive]:
        c, s = self.clothes, self.scale
        rotation = turn(yaw=self.pose.head_yaw, pitch=self.pose.head_pitch - self.pose.lean * 0.5)
        head = self._at("head")
        shapes = [ellipsoid(head, (0.078 * s, 0.112 * s, 0.096 * s), c.face, rotation=rotation, part="head")]

        def near(x: float, y: float, z: float) -> Vector:
            a, b, d = np.array(head, np.float32) + rotation @ np.array([x * s, y * s, z * s], np.float32)
            return float(a), float(b), float(d)

        shapes.append(ellipsoid(near(0, -0.018, -0.094), (0.013 * s, 0.022 * s, 0.018 * s), c.skin, part="head"))
        if c.haircut == "bald":
            return shapes
        if c.haircut == "cap":
            cap = c.shoes._replace(pattern="plain", gloss=0.0)
            shapes.append(ellipsoid(near(0, 0.03, 0.004), (0.088 * s, 0.098 * s, 0.104 * s), cap, rotation=rotation,
                                    part="hair", cut=((0.0, -1.0, 0.0, 0.1),)))  # fmt: skip
            shapes.append(ellipsoid(near(0, 0.045, -0.10), (0.072 * s, 0.012 * s, 0.075 * s), cap, rotation=rotation,
                                    part="hair"))  # fmt: skip
            return shapes
        hairline = ((0.0, -0.66, -0.75, -0.10),)
        shapes.append(ellipsoid(near(0, 0.014, 0.012), (0.090 * s, 0.118 * s, 0.104 * s), c.hair, rotation=rotation,
                                part="hair", cut=hairline))  # fmt: skip
        if c.haircut == "long":
            shapes.append(
                self._cone(near(0, 0.02, 0.035), near(0, -0.2, 0.06), (0.088, 0.07), c.hair, "hair", flat=0.75)
            )
        if c.haircut == "bun":
            shapes.append(ellipsoid(near(0, 0.11, 0.07), (0.045 * s, 0.045 * s, 0.045 * s), c.hair, part="hair"))
        return shapes

    def _arm(self, side: str) -> list[Primitive]:
        c, girth = self.clothes, self.clothes.build
        upper = lower = c.shirt._replace(pattern="plain") if c.shirt.pattern in {"logo", "dots"} else c.shirt
        if c.sleeves == "short":
            sleeve = upper.color
            upper, lower = Material(sleeve, c.skin.color, "above", 0.19 * self.scale), c.skin
        elif c.sleeves == "none":
            upper = lower = c.skin
        wide = 0.006 if c.sleeves == "long" else 0.0
        shoulder, elbow, wrist = self._at(side + "shoulder"), self._at(side + "elbow"), self._at(side + "wrist")
        return [
            self._cone(shoulder, elbow, (0.060 * girth, 0.043 * girth + wide), upper, side + "uarm"),
            self._cone(elbow, wrist, (0.041 * girth + wide, 0.031 + wide), lower, side + "larm"),
            self._cone(wrist, self._at(side + "hand"), (0.033, 0.030), c.skin, side + "hand", flat=0.7),
        ]

    def _leg(self, side: str) -> list[Primitive]:
        c, girth = self.clothes, self.clothes.build
        hip, knee, ankle = self._at(side + "hip"), self._at(side + "knee"), self._at(side + "ankle")
        upper, lower = c.trousers, c.trousers
        if self.legs != "long":
            upper, lower = Material(c.trousers.color, c.skin.color, "above", 0.30 * self.scale), c.skin
        wide = 0.010 if self.legs == "long" else 0.0
        toe = self.joints[side + "ankle"] + np.array([0.03 if side == "l" else -0.03, -0.045, -0.15], np.float32)
        heel = self.joints[side + "ankle"] + np.array([0.0, -0.04, 0.035], np.float32)
        shapes = [
            self._cone(hip, knee, (0.094 * girth, 0.062 * girth + wide), upper, side + "uleg"),
            self._cone(knee, ankle, (0.060 * girth + wide, 0.040 + wide), lower, side + "lleg"),
            self._cone(self._scaled(heel), self._scaled(toe), (0.045, 0.038), c.shoes, side + "foot"),
        ]
        if self.legs == "skirt":
            shapes.append(self._skirt(side))
        return shapes

    def _skirt(self, side: str) -> Primitive:
        """Half of a skirt: one side of a frustum from the waist to above the knees."""
        x, y, z = self._at("hips", (0.0, -0.13, 0.0))
        s = self.scale
        whole = frustum((x, y, z), (0.25 * s, 0.24 * s, 0.21 * s), self.clothes.trousers, top=0.55, part=side + "uleg")
        return whole._replace(planes=(*whole.planes, (-1.0 if side == "l" else 1.0, 0.0, 0.0, 0.0)))


def _limb_directions(limb: Limb, sign: float, *, elbow: bool) -> tuple[Array, Array]:
    """Directions of a limb's two bones; forward is -z. An elbow bends the forearm forward, a knee the shin back."""
    rotation = turn(roll=sign * limb.spread, pitch=0.0)
    swing = turn(pitch=limb.swing)
    upper = swing @ (rotation @ np.array([0.0, -1.0, 0.0], np.float32))
    bend = turn(pitch=limb.bend if elbow else -limb.bend)
    inward = turn(yaw=sign * limb.twist)
    lower = swing @ (rotation @ (inward @ (bend @ np.array([0.0, -1.0, 0.0], np.float32))))
    return upper, lower
