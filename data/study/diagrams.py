"""Diagrams of the runs of data.study.compare, drawn as the other pictures are (data/pictures.py)."""

import math

import numpy as np
from PIL import Image, ImageFont

from data.pictures import BLUE, GREY, LARGE, LINE, MARGIN, ORANGE, WIDTH, Sheet
from data.study import compare

GREEN, YELLOW, SKY = "#009e73", "#e69f00", "#56b4e9"  # Okabe and Ito's, too
PALE = "#e4e7ec"
SMALL = ImageFont.load_default(44)
FRAME = LEFT, TOP, RIGHT, BOTTOM = MARGIN + 120, 190, WIDTH - 780, 1720  # around the grid; the legend is right of it

LINES = {"LoRA": ORANGE, "LoRA on v": YELLOW, "Partial LoRA": GREEN, "Partial LoRA on v": SKY, "Image-LoRA": BLUE}
POINTS = (  # method, shape, letters in it, colour
    ("Image-LoRA in 12 heads by the probe", "circle", "12", BLUE),
    ("Image-LoRA in 4 heads by the probe", "circle", "4", BLUE),
    ("Partial LoRA on v, rank 4", "hexagon", "r4", SKY),
    ("LoRA with replay", "diamond", "R", ORANGE),
    ("Image-LoRA with replay", "diamond", "R", BLUE),
)
POINT_TITLES = {
    "circle": "heads by the probe",
    "hexagon": "rank 4",
    "diamond": "with replay",
}


class Diagram(Sheet):
    """A sheet with a grid, where pairs of numbers have places. ticks: {number: text}."""

    def __init__(self, x_title: str, x_range: tuple, x_ticks: dict, y_title: str, y_range: tuple, y_ticks: dict):
        super().__init__(height=1940)
        self.x_range, self.y_range = x_range, y_range
        self.write((LEFT + RIGHT) / 2, BOTTOM + 144, x_title, font=LARGE, anchor="mm")
        self.write(MARGIN, MARGIN + 36, y_title, font=LARGE)
        for number, text in x_ticks.items():
            x, _ = self.place(number, 0)
            self.draw.line((x, TOP, x, BOTTOM), PALE, 4)
            self.write(x, BOTTOM + 56, text, GREY, "mm")
        for number, text in y_ticks.items():
            _, y = self.place(0, number)
            self.draw.line((LEFT, y, RIGHT, y), PALE, 4)
            self.write(LEFT - 24, y, text, GREY, "rm")

    def place(self, x, y) -> np.ndarray:
        """Where numbers x and y stand on the sheet, [.., 2]."""
        across = (np.asarray(x) - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        up = (np.asarray(y) - self.y_range[0]) / (self.y_range[1] - self.y_range[0])
        return np.stack([LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)], -1)

    def point(self, x, y, shape: str, colour: str, letters=""):
        """A point, or a large one with letters in it."""
        size = 2.2 if letters else 1
        if shape == "circle":
            self.draw.circle((x, y), 20 * size, colour, "white", 3)
        else:
            sides, turn = {"diamond": (4, 45), "hexagon": (6, 0)}[shape]
            self.draw.regular_polygon((x, y, 25 * size), sides, turn, colour, "white")
        self.write(x, y, letters, "white", "mm", SMALL)

    def dashes(self, left, right, y):
        for x in range(left, right, 40):
            self.draw.line((x, y, x + 20, y), GREY, 5)


def heads_alone(runs: list[dict]) -> Image.Image:
    """A point for each head of model 1: how many switches it clicks alone, and its influence before training."""
    runs = [run for run in runs if run["influence"] != ""]
    influence = np.log10([run["influence"] for run in runs])
    clicks = np.array([run["task_acc"] for run in runs])
    x_range = influence.min() - 0.1, influence.max() + 0.1
    x_ticks = {power: f"{10.0**power:g}" for power in range(math.ceil(x_range[0]), math.floor(x_range[1]) + 1)}
    y_ticks = {percent / 100: str(percent) for percent in range(0, 101, 20)}
    titles = "influence of the head before training", "switches clicked with one head alone, %"
    diagram = Diagram(titles[0], x_range, x_ticks, titles[1], (0, 1), y_ticks)

    # The points, and a name beside each where there is room
    taken = diagram.place(influence, clicks)  # places of points and names, [.., 2]
    for point, run in zip(taken, runs):
        diagram.point(*point, "circle", BLUE)
        for shift in ((64, 0), (-64, 0), (0, -48), (0, 48), (54, -46), (-54, -46), (54, 46), (-54, 46)):
            beside = point + shift
            if (abs(taken - beside) >= (60, 46)).any(1).all():
                diagram.write(*beside, run["heads"], BLUE, "mm", SMALL)
                taken = np.vstack([taken, beside])
                break

    # The legend
    y = TOP + 50
    diagram.point(RIGHT + 80, y, "circle", BLUE)
    diagram.write(RIGHT + 130, y, "model 1", font=LARGE)
    diagram.write(RIGHT + 130, y + LINE + 8, f"rank correlation {rank_correlation(influence, clicks):.2f}", GREY)
    return diagram.image.reduce(2)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks, where equal numbers share the mean of theirs."""
    ranks = [np.sign(numbers[:, None] - numbers).sum(1) for numbers in (x, y)]
    return float(np.corrcoef(ranks)[0, 1])


def trade_off(runs: list[dict]) -> Image.Image:
    """The new task, across, and the other questions, up: LINES through the learning rates of each method, and POINTS.

    All are means over the models: along the lines with seed 1, so that only the rate differs, and elsewhere over all
    seeds. A line is cut off where it leaves the frame."""
    x_ticks = {percent / 100: str(percent) for percent in range(94, 101)}
    y_ticks = {percent / 100: str(percent) for percent in range(0, 101, 10)}
    diagram = Diagram("new task, %", (0.94, 1.0), x_ticks, "other questions, %", (0.0, 1.0), y_ticks)
    draw = diagram.draw

    def place(settings: dict, seed=None) -> np.ndarray:
        models = compare.mean_of_each_model(compare.find(runs, settings, seed=seed))
        accuracies = [np.mean([model[name] for model in models]) for name in ("task_acc", "other_questions_acc")]
        return diagram.place(*accuracies)

    diagram.dashes(LEFT, RIGHT, place(compare.BASE_MODEL)[1])
    grid = diagram.image.copy()
    for method, colour in LINES.items():
        settings = compare.METHODS[method]
        rates = compare.RATES[compare.SKILLED][method]
        places = [place(settings | {"lr": lr}, seed=1) for lr in rates]
        draw.line([tuple(point) for point in places], colour, 10, "curve")
        for point in places[:-1]:
            draw.circle(point, 14, colour)
        across, down = places[-1] - places[-2]
        turn = 30 + math.degrees(math.atan2(-down, across))  # of a triangle that points along the line
        draw.regular_polygon((*places[-1], 26), 3, turn, colour)
        draw.circle(places[rates.index(settings["lr"])], 30, colour, "white", 6)
    inside = diagram.image.crop(FRAME)
    diagram.image.paste(grid)
    diagram.image.paste(inside, FRAME)
    for method, shape, letters, colour in POINTS:
        diagram.point(*place(compare.METHODS[method]), shape, colour, letters)

    # The legend
    x, y = RIGHT + 100, TOP + 30
    for method, colour in LINES.items():
        draw.line((x - 50, y, x + 50, y), colour, 10)
        draw.circle((x, y), 30, colour, "white", 6)
        diagram.write(x + 80, y, method)
        y += LINE + 8
    diagram.dashes(x - 50, x + 50, y)
    diagram.write(x + 80, y, "base model")
    for text in ("Lines lead from low to high", "learning rates; a large dot is", "the one that was chosen."):
        y += 60
        diagram.write(x - 50, y + 16, text, GREY, font=SMALL)
    y += 60
    for shape, title in POINT_TITLES.items():
        y += LINE + 30
        _, _, letters, colour = next(point for point in POINTS if point[1] == shape)
        diagram.point(x, y, shape, colour, letters)
        diagram.write(x + 80, y, title)
    return diagram.image.reduce(2)
