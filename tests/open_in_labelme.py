"""Open annotation files in the real labelme, 6 or 7, without a screen; run with its Python.

Words: the files. The last line printed is JSON: for each file its shapes as labelme holds them, and
how many pixels of its canvas they change.
"""

import json
import sys

try:
    from labelme._app import MainWindow
    from PySide6 import QtWidgets
except ModuleNotFoundError:
    from labelme.app import MainWindow
    from PyQt5 import QtWidgets

import numpy as np


def pixels(canvas):
    """What is on the canvas now."""
    image = canvas.grab().toImage()
    bits = image.constBits()
    if hasattr(bits, "setsize"):  # PyQt5
        bits.setsize(image.sizeInBytes())
    return np.frombuffer(bits, np.uint32).copy()  # the image's memory ends with it


def opened(file):
    window = MainWindow(file_or_dir=file)
    window.resize(1000, 800)
    window.show()
    canvas = window._canvas_widgets.canvas
    for _ in range(200):
        app.processEvents()
        if not canvas.pixmap.isNull() and canvas.shapes:
            break
    shapes = [
        {
            "label": shape.label,
            "shape_type": shape.shape_type,
            "group_id": shape.group_id,
            "points": len(shape.points),
            "mask": None if shape.mask is None else [list(shape.mask.shape), int(shape.mask.sum())],
        }
        for shape in canvas.shapes
    ]
    drawn = pixels(canvas)
    canvas.shapes = []
    canvas.update()
    app.processEvents()
    changed = int(np.count_nonzero(drawn != pixels(canvas)))
    window.close()
    return {"shapes": shapes, "changed": changed}


app = QtWidgets.QApplication(["labelme"])
print(json.dumps([opened(file) for file in sys.argv[1:]]), flush=True)
