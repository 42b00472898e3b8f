from __future__ import annotations

import base64
import struct

from limbeck.report.fronts import front_png


def test_a_picture_of_fronts() -> None:
    png = base64.b64decode(
        front_png(
            {"a": [(1e5, 97), (1e4, 95.0)], "best": [(5e4, 98)], "none": []}, "FLOPs", "accuracy", starred=["best"]
        )
    )
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert width > height > 200
