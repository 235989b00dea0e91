"""Named arrays: weights, their form on disk and in messages, their weighted mean, random keys."""
