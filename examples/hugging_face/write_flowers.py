from pathlib import Path

from sklearn.datasets import load_iris

INPUTS = ("sepal-length", "sepal-width", "petal-length", "petal-width")

table = load_iris(as_frame=True).frame
table.columns = [*INPUTS, "label"]
Path("flowers").mkdir(exist_ok=True)
table.to_parquet("flowers/train.parquet")
