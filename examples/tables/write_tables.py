import numpy as np

rng = np.random.default_rng(0)
for clinic, rows in enumerate((400, 250, 150)):
    age = rng.uniform(20, 80, rows)
    pressure = rng.normal(90 + 0.5 * age, 12)
    sugar = rng.normal(5.5, 1.2, rows)
    risk = 0.08 * (age - 50) + 0.05 * (pressure - 115) + 0.9 * (sugar - 5.5)
    ill = rng.random(rows) < 1 / (1 + np.exp(-risk))
    table = np.column_stack([age, pressure, sugar, ill])
    header = "age,pressure,sugar,ill"
    np.savetxt(f"clinic-{clinic}.csv", table, "%.2f", ",", header=header, comments="")
