// A picture as the model takes it, and its answer in words: what predict.py does, step by step.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include "json.hpp"
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_ONLY_BMP
#define STBI_ONLY_PNM
#include "third_party/stb_image.h"

struct Picture {  // rows of pixels of `channels` numbers from 0 to 255
  int width, height, channels;
  std::vector<float> data;
};

inline Picture read_picture(const std::string& path, int channels) {
  int width, height, own;
  unsigned char* pixels = stbi_load(path.c_str(), &width, &height, &own, 3);
  if (!pixels) throw std::runtime_error(path + ": can't be read as a picture (" + stbi_failure_reason() + ")");
  Picture read{width, height, channels, std::vector<float>(size_t(width) * height * channels)};
  for (size_t i = 0; i < size_t(width) * height; ++i)
    if (channels == 3) std::copy_n(pixels + 3 * i, 3, &read.data[3 * i]);
    else read.data[i] = (pixels[3 * i] * 19595 + pixels[3 * i + 1] * 38470 + pixels[3 * i + 2] * 7471 + 32768) >> 16;
  stbi_image_free(pixels);
  return read;
}

// Along one axis, as Pillow does it (weights of 22 bits, a whole number after each axis); `plain`: the two neighbours alone.
inline Picture along(const Picture& from, int size, bool across, const std::string& how, bool plain) {
  const int own = across ? from.width : from.height;
  if (own == size) return from;
  Picture to{across ? size : from.width, across ? from.height : size, from.channels, {}};
  to.data.resize(size_t(to.width) * to.height * to.channels);
  const double step = double(own) / size, spread = plain ? 1 : std::max(step, 1.0);
  const double reach = (how == "bicubic" ? 2 : 1) * spread;
  auto weight = [&](double x) {
    x = std::abs(x);
    if (how != "bicubic") return std::max(0.0, 1 - x);
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  };
  for (int place = 0; place < size; ++place) {
    const double centre = (place + 0.5) * step;
    const int nearest = std::min(int(centre), own - 1);
    int first = std::max(0, int(centre - reach + 0.5)), last = std::min(own, int(centre + reach + 0.5));
    if (plain) first = int(std::clamp(centre - 0.5, 0.0, own - 1.0)), last = std::min(first + 2, own);
    if (how == "nearest") first = nearest, last = nearest + 1;
    std::vector<double> share(last - first);
    for (int i = first; i < last; ++i)
      share[i - first] = how == "nearest" ? 1 : plain ? 1 - std::abs(std::clamp(centre - 0.5, 0.0, own - 1.0) - i)
                                                      : weight((i - centre + 0.5) / spread);
    const double sum = std::accumulate(share.begin(), share.end(), 0.0);
    for (double& one : share) one = plain ? one : std::round(one / sum * (1 << 22));
    for (int line = 0; line < (across ? from.height : from.width); ++line)
      for (int channel = 0; channel < from.channels; ++channel) {
        double total = 0;
        for (int i = first; i < last; ++i)
          total += share[i - first] * from.data[(size_t(across ? line : i) * from.width + (across ? i : line)) * from.channels + channel];
        const double value = plain ? total : std::clamp(std::floor((total + (1 << 21)) / (1 << 22)), 0.0, 255.0);
        to.data[(size_t(across ? line : place) * to.width + (across ? place : line)) * to.channels + channel] = float(value);
      }
  }
  return to;
}

inline Picture resized(const Picture& from, int width, int height, const std::string& how, bool plain = false) {
  if (!plain) return along(along(from, width, true, how, plain), height, false, how, plain);
  Picture to = along(along(from, height, false, how, plain), width, true, how, plain);
  for (float& one : to.data) one = std::clamp(std::nearbyint(one), 0.0f, 255.0f);
  return to;
}

// Part of `from`, from (left, top) on, put on a canvas of that size at (-left, -top) where these are negative.
inline Picture moved(const Picture& from, int width, int height, int left, int top, const std::vector<float>& fill) {
  Picture to{width, height, from.channels, std::vector<float>(size_t(width) * height * from.channels)};
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x)
      for (int channel = 0; channel < from.channels; ++channel) {
        const int row = y + top, column = x + left;
        const bool inside = row >= 0 && row < from.height && column >= 0 && column < from.width;
        to.data[(size_t(y) * width + x) * from.channels + channel] =
            inside ? from.data[(size_t(row) * from.width + column) * from.channels + channel] : fill[channel];
      }
  return to;
}

// (C, H, W) float32 of a classifier, as it was judged on.
inline std::vector<float> prepared(Picture picture, const Json& about) {
  const int height = int(about["size"][0].number), width = int(about["size"][1].number), channels = picture.channels;
  int wide = width, high = height;
  const double crop = about["crop"].kind == Json::NUMBER ? about["crop"].number : 0;
  if (crop != 0 && (crop < 1 || picture.width != width || picture.height != height)) {
    const int least = std::min(picture.width, picture.height);
    const int side = std::max({int(std::nearbyint(std::max(height, width) / crop)), height, width});
    wide = picture.width == least ? side : int(int64_t(side) * picture.width / least);
    high = picture.height == least ? side : int(int64_t(side) * picture.height / least);
  }
  picture = resized(picture, wide, high, about["interpolation"].text);
  const int left = int(std::nearbyint((wide - width) / 2.0)), top = int(std::nearbyint((high - height) / 2.0));
  picture = moved(picture, width, height, left, top, std::vector<float>(channels));
  std::vector<float> values(picture.data.size());
  for (int channel = 0; channel < channels; ++channel)
    for (int i = 0; i < height * width; ++i)
      values[channel * height * width + i] = (picture.data[i * channels + channel] / 255.0f - float(about["mean"][channel].number)) / float(about["std"][channel].number);
  return values;
}
