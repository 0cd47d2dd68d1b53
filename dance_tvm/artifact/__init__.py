"""The folder that a build leaves: library, weights, manifest."""
