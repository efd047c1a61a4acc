"""What a step adds to the cumulative sum of a signal (detector.py), the same for every signal."""

# Deviations below this add nothing: independent noise and slow drift stay around zero.
ALLOWANCE = 3.0
# One step adds at most this much less the allowance, however tall it is.
TALLEST = 8.0
