// TensorRT's dimension expressions, evaluated at once: every expression is a number.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "tensorrt.h"

namespace stts {

class FakeExpression final : public nvinfer1::IDimensionExpr,
                             private nvinfer1::apiv::VDimensionExpr {
  public:
    explicit FakeExpression(int64_t value, bool is_size = false)
        : value_(value), is_size_(is_size) {
        mImpl = this;
    }
    ~FakeExpression() noexcept override = default;

    int64_t value() const { return value_; }
    bool isSize() const { return is_size_; }

  private:
    bool isConstant() const override { return !is_size_; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return is_size_; }

    int64_t value_;
    bool is_size_;
};

inline int64_t valueOf(const nvinfer1::IDimensionExpr& expression) {
    return static_cast<const FakeExpression&>(expression).value();
}

// Owns the expressions that it hands out. The value of a size tensor is its upper bound.
class FakeBuilder final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
  public:
    FakeBuilder() { mImpl = this; }
    ~FakeBuilder() noexcept override = default;

    const nvinfer1::IDimensionExpr* number(int64_t value) { return keep(value, false); }

    nvinfer1::DimsExprs dims(const std::vector<int64_t>& values) {
        nvinfer1::DimsExprs result{};
        result.nbDims = static_cast<int32_t>(values.size());
        for (size_t i = 0; i < values.size(); ++i) result.d[i] = number(values[i]);
        return result;
    }

    // Returns null from then on, as TensorRT does for operations that it refuses.
    void refuseOperations() { refuses_ = true; }

    // Throws from then on: NVIDIA's declaration allows it.
    void throwForSizeTensors() { throws_ = true; }

    int32_t sizeTensor() const { return size_tensor_; }
    int64_t sizeOpt() const { return size_opt_; }
    int64_t sizeUpper() const { return size_upper_; }

  private:
    const nvinfer1::IDimensionExpr* keep(int64_t value, bool is_size) {
        expressions_.push_back(std::make_unique<FakeExpression>(value, is_size));
        return expressions_.back().get();
    }

    const nvinfer1::IDimensionExpr* constant(int64_t value) override { return keep(value, false); }

    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation op,
                                              const nvinfer1::IDimensionExpr& first,
                                              const nvinfer1::IDimensionExpr& second) override {
        if (refuses_) return nullptr;
        const int64_t a = valueOf(first);
        const int64_t b = valueOf(second);
        switch (op) {
            case nvinfer1::DimensionOperation::kSUM:
                return number(a + b);
            case nvinfer1::DimensionOperation::kPROD:
                return number(a * b);
            case nvinfer1::DimensionOperation::kMAX:
                return number(std::max(a, b));
            case nvinfer1::DimensionOperation::kMIN:
                return number(std::min(a, b));
            case nvinfer1::DimensionOperation::kSUB:
                return number(a - b);
            case nvinfer1::DimensionOperation::kEQUAL:
                return number(a == b ? 1 : 0);
            case nvinfer1::DimensionOperation::kLESS:
                return number(a < b ? 1 : 0);
            case nvinfer1::DimensionOperation::kFLOOR_DIV:
                return number(a / b);
            case nvinfer1::DimensionOperation::kCEIL_DIV:
                return number((a + b - 1) / b);
        }
        return nullptr;
    }

    const nvinfer1::IDimensionExpr* declareSizeTensor(
        int32_t output, const nvinfer1::IDimensionExpr& opt,
        const nvinfer1::IDimensionExpr& upper) override {
        if (throws_) throw std::runtime_error("no size tensor");
        size_tensor_ = output;
        size_opt_ = valueOf(opt);
        size_upper_ = valueOf(upper);
        return keep(size_upper_, true);
    }

    std::vector<std::unique_ptr<FakeExpression>> expressions_;
    bool refuses_ = false;
    bool throws_ = false;
    int32_t size_tensor_ = -1;
    int64_t size_opt_ = 0;
    int64_t size_upper_ = 0;
};

}  // namespace stts
