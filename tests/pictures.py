"""Pictures that the tests make up."""

import struct

import numpy as np
from PIL import Image


def make_picture(seed, width=80, height=80):
    """A soft random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def display_p3():
    """ICC profile (version 4) of Display P3, the colours of phones, as bytes: its primaries and the curve of sRGB."""

    def xyz(x, y):
        return np.array([x / y, 1, (1 - x - y) / y])

    # primaries and white point by their chromaticities, white at Y = 1
    primaries = np.stack([xyz(0.680, 0.320), xyz(0.265, 0.690), xyz(0.150, 0.060)], 1)
    d65, d50 = xyz(0.3127, 0.3290), np.array([0.9642, 1, 0.8249])
    to_xyz = primaries * np.linalg.solve(primaries, d65)
    # profiles are relative to D50: the Bradford adaptation
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapted = np.linalg.inv(cones) @ np.diag(cones @ d50 / (cones @ d65)) @ cones @ to_xyz

    def fixed(*values):
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = b"para" + struct.pack(">IHH", 0, 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(*d50)}
    for index, name in enumerate((b"r", b"g", b"b")):
        tags |= {name + b"XYZ": b"XYZ " + bytes(4) + fixed(*adapted[:, index]), name + b"TRC": curve}
    start = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    kind = b"mntrRGB XYZ "  # of a screen; from RGB, to XYZ
    header = struct.pack(">III12s12x4s", start + len(data), 0, 0x04000000, kind, b"acsp")
    header = header.ljust(68, b"\0") + fixed(*d50)
    return header.ljust(128, b"\0") + table + data


def unwritable_exif():
    """Metadata of a picture on its side, with a number that Pillow reads and can't write: a resolution of -1/0."""
    entries = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHLL", 0x011A, 10, 1, 38)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + struct.pack("<Lll", 0, -1, 0)
