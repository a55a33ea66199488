"""Generated scenes: rendered pictures with exact labels, the data set that needs no download."""
