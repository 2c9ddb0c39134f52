"""Looking at a prepared dataset: pictures of samples, and a report with its problems."""
