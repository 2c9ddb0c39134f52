"""`samray labelme` with a hand that clicks: the real program, driven in place of its event loop.

It runs with labelme 6 on PyQt5 and with labelme 7 on PySide6.

Words: the endpoint's address, its token file, a photo, an output folder, labelme's mode, and the
clicks, each `x,y` in shares of the photo. The last line printed is JSON of what came of it.
"""

import json
import sys

try:
    from PySide6 import QtCore, QtWidgets
    from PySide6.QtTest import QTest
except ModuleNotFoundError:
    from PyQt5 import QtCore, QtWidgets
    from PyQt5.QtTest import QTest

from samray.cli import main

SEVEN = QtCore.__name__.startswith("PySide6")

url, token_file, photo, output, mode, *clicks = sys.argv[1:]


def xy(point):
    return [float(value) for value in (point if SEVEN else (point.x(), point.y()))]


def drive(*_):
    if SEVEN:
        from labelme._app import MainWindow
    else:
        from labelme.app import MainWindow

    app = QtWidgets.QApplication.instance()
    window = next(w for w in app.topLevelWidgets() if isinstance(w, MainWindow))
    for _ in range(50):
        app.processEvents()
        QTest.qWait(20)
        if not window._canvas_widgets.canvas.pixmap.isNull():
            break
    canvas = window._canvas_widgets.canvas
    combo = window._ai_annotation._model_combo
    result = {"model": canvas.get_ai_model_name(), "title": combo.currentText()}
    if SEVEN:  # its dialogs list the models, too
        window._open_settings()
        window._open_models()
        app.processEvents()
        setting = window._settings_dialog._editors["ai", "default"]
        result["setting"] = setting.currentText()
        window._settings_dialog.close()
        window._models_dialog.close()
    window._switch_canvas_mode(edit=False, create_mode=mode)
    size = canvas.pixmap.width(), canvas.pixmap.height()
    warnings = []
    QtWidgets.QMessageBox.warning = lambda *words: warnings.append(words[2])
    canvas.new_shape.disconnect()  # it would open the dialog for the label and wait

    def place(click):
        x, y = (float(part) for part in click.split(","))
        offset = canvas._compute_image_origin_offset(**({"area": None} if SEVEN else {}))
        spot = QtCore.QPointF(x * size[0], y * size[1]) + offset
        return (spot * canvas.scale).toPoint()

    for number, click in enumerate(clicks):
        last = number == len(clicks) - 1 and mode == "ai_points_to_shape"
        keys = QtCore.Qt.KeyboardModifier
        held = keys.ControlModifier if last else keys.NoModifier
        QTest.mouseMove(canvas, place(click))
        QTest.mouseClick(canvas, QtCore.Qt.MouseButton.LeftButton, held, place(click))
        app.processEvents()
        canvas.repaint()  # labelme asks for a mask whenever it draws
    QTest.qWait(50)
    result["warnings"] = warnings
    result["size"] = size
    result["shapes"] = [
        {"shape_type": shape.shape_type, "points": [xy(point) for point in shape.points]}
        for shape in canvas.shapes
    ]
    print(json.dumps(result), flush=True)
    return 0


setattr(QtWidgets.QApplication, "exec" if SEVEN else "exec_", drive)
words = ["labelme", "--url", url, "--token-file", token_file, "--", photo, "--output", output]
sys.exit(main([*words, "--logger-level", "error"]))
