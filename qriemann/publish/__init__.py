"""What others get to see of a run: `report.html`, the model card and the upload. Reads folders, trains nothing."""
