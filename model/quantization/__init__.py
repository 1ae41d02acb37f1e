"""INT8 quantization: observers, fake-quantized convolutions, calibration, sensitivity.

The number format, shared by training, export and the structure checker: symmetric int8 with zero point 0, so a real
value is ``scale * integer`` with integers from -128 to 127.
"""

QUANTIZED_MINIMUM, QUANTIZED_MAXIMUM = -128, 127
SMALLEST_SCALE = 6.103515625e-5
"""2**-14, the smallest normal float16: a smaller scale would lose its digits in an engine with FP16 scales."""
