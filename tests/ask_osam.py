"""Ask the model that `samray labelme` registers, as labelme does; run with labelme's Python.

Words: the endpoint's address, its token, a photo, and a spot as x and y. The last line printed is
JSON of what came of it.
"""

import json
import sys

import numpy as np
import osam
from PIL import Image

from samray.serving.labelme_client import Endpoint, model_type

url, token, photo, *spot = sys.argv[1:]
spot = [float(value) for value in spot]
image = np.asarray(Image.open(photo).convert("RGB"))
height, width = image.shape[:2]
endpoint, told, uploads = Endpoint(url, token), [], []
upload = endpoint.upload
endpoint.upload = lambda image: uploads.append(upload(image)) or uploads[-1]
model = model_type(endpoint, told.append)()
embedding = model.encode_image(image)


def ask(points, labels):
    """The annotations, each as its box, the pixels of its mask, and its score."""
    prompt = osam.types.Prompt(points=np.array(points), point_labels=np.array(labels))
    request = osam.types.GenerateRequest(
        model=model.name, image=image, image_embedding=embedding, prompt=prompt
    )
    found = []
    for annotation in model.generate(request).annotations:
        box = annotation.bounding_box
        assert annotation.mask.shape == (box.ymax + 1 - box.ymin, box.xmax + 1 - box.xmin)
        whole = np.zeros((height, width), bool)
        whole[box.ymin : box.ymax + 1, box.xmin : box.xmax + 1] = annotation.mask
        found.append([np.flatnonzero(whole).tolist(), annotation.score])
    return found


result = {"clicks": [ask([spot, [0, 0]], [1, 0]) for _ in range(2)], "uploads": [len(uploads)]}
endpoint.session.delete(f"{url}/v1/images/{uploads[0]}", timeout=60)
result["box"] = ask([[width, height], [0, 0]], [2, 3])  # out to the border
result["uploads"].append(len(uploads))
result["background"] = ask([spot], [0])
result["told"] = list(told)
endpoint.url = "http://127.0.0.1:9"
result["failed"] = [ask([spot], [1]) for _ in range(2)]
result["told after"] = told
print(json.dumps(result), flush=True)
