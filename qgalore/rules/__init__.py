"""From a gradient to a direction, and from a direction back to a weight."""
