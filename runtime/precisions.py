"""What a linear layer's weights are stored in, by name, and the tensor of a bundle that holds them."""

FP32, FP16, INT8, INT8_WEIGHT, INT4_WEIGHT = "fp32", "fp16", "int8", "int8-weight", "int4-weight"
PRECISIONS = (FP32, FP16, INT8, INT8_WEIGHT, INT4_WEIGHT)
BITS = {INT8_WEIGHT: 8, INT4_WEIGHT: 4}  # of a weight-only value
WEIGHT_TENSORS = {  # `{layer}.…`; export/linear.py has their layouts
    FP32: "weight",
    FP16: "weight_fp16",
    INT8: "weight_int8",
    INT8_WEIGHT: "weight_blocks8",
    INT4_WEIGHT: "weight_blocks4",
}
