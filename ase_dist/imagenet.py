"""ImageNet's colour statistics, with which every image is normalised: of R, G and B as fractions of 255."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
