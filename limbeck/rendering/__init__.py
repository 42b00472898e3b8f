"""Cameras, rays and renderers: one convention for everything three-dimensional.

The world is right-handed with +Z up. A camera's matrix is camera-to-world with OpenGL axes (+X right, +Y up, looking along -Z), as in
NeRF's ``transforms.json``. Pixel (i, j) is column i of row j, row 0 on top, its centre at (i + 0.5, j + 0.5). Directions have unit
length, so the ``t`` of a sample is a distance in world units. Images are (B, H, W, 3) in [0, 1]. OpenCV's, COLMAP's and instant-ngp's
conventions are translated at the door, by the functions in ``cameras``.
"""
