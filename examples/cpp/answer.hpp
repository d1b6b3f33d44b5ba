// What is fed and what is printed: the five likeliest classes, or boxes in the picture's own pixels.
#pragma once
#include <functional>
#include "picture.hpp"

struct Placed {  // a detector's input; its boxes minus (left, top), over (across, down) are the picture's
  Picture picture;
  double left, top, across, down;
};

inline Placed placed(const Picture& from, const Json& feed) {
  const int height = int(feed["size"][0].number), width = int(feed["size"][1].number);
  const bool plain = feed["antialias"].kind != Json::TRUE;
  if (feed["resize"].text == "stretch")
    return {resized(from, width, height, "bilinear", plain), 0, 0, double(width) / from.width, double(height) / from.height};
  const double ratio = std::min(double(height) / from.height, double(width) / from.width);
  const bool centred = feed["centred"].kind == Json::TRUE;
  auto scaled = [&](int own) { return std::max(1, int(centred ? std::nearbyint(own * ratio) : own * ratio)); };
  const int wide = scaled(from.width), high = scaled(from.height);
  const int left = centred ? int(std::nearbyint((width - wide) / 2.0 - 0.1)) : 0;
  const int top = centred ? int(std::nearbyint((height - high) / 2.0 - 0.1)) : 0;
  std::vector<float> fill(3);
  for (int i = 0; i < 3; ++i)
    fill[i] = float(std::nearbyint(feed["fill"].kind == Json::LIST ? feed["fill"][i].number : feed["fill"].number));
  return {moved(resized(from, wide, high, "bilinear", plain), width, height, -left, -top, fill), double(left), double(top), ratio, ratio};
}

// Runs the model on one picture: bytes of its input (uint8 or float32) and its shape -> numbers of its answer.
using Run = std::function<std::vector<float>(const void* data, size_t bytes, const std::vector<int64_t>& shape)>;

inline std::string named(const Json& about, size_t place) {
  const bool known = about.has("class_names") && place < about["class_names"].list.size();
  return known ? about["class_names"][int(place)].text : std::to_string(place);
}

inline void show(const std::string& path, const Json& about, const Run& run, double least = 0.3) {
  if (about.has("feed")) {
    const Placed input = placed(read_picture(path, 3), about["feed"]);
    const std::vector<uint8_t> pixels(input.picture.data.begin(), input.picture.data.end());
    const std::vector<float> found = run(pixels.data(), pixels.size(), {1, input.picture.height, input.picture.width, 3});
    for (size_t at = 0; at + 6 <= found.size(); at += 6) {
      const float* box = &found[at];
      if (box[4] < 0 || box[5] < least) continue;
      std::printf("%s: %s%s %.4f at %.1f, %.1f, %.1f, %.1f\n", path.c_str(), about.has("class_names") ? "" : "class ",
                  named(about, size_t(box[4])).c_str(), box[5], (box[0] - input.left) / input.across,
                  (box[1] - input.top) / input.down, (box[2] - input.left) / input.across, (box[3] - input.top) / input.down);
    }
    return;
  }
  const Json& how = about["preprocessing"];
  const int channels = how["channels"].text == "L" ? 1 : 3;
  const std::vector<float> values = prepared(read_picture(path, channels), how);
  const int64_t height = int64_t(how["size"][0].number), width = int64_t(how["size"][1].number);
  std::vector<float> scores = run(values.data(), values.size() * sizeof(float), {1, channels, height, width});
  if (scores.size() == 1 && about.has("class_names") && about["class_names"].list.size() == 2)  // one number for two classes
    scores.insert(scores.begin(), about["answer_ends_in"].text == "sigmoid" ? 1 - scores[0] : 0);
  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  std::printf("%s:", path.c_str());
  for (size_t i = 0; i < std::min<size_t>(5, order.size()); ++i)
    std::printf("%s %s %.4f", i ? "," : "", named(about, order[i]).c_str(), scores[order[i]]);
  std::printf("\n");
}

inline int guarded(int count, char** arguments, const std::function<void(const std::string&)>& open_then_show) {
  if (count < 3) return std::fprintf(stderr, "usage: %s MODEL PICTURE...\n", arguments[0]), 2;
  try {
    open_then_show(arguments[1]);
    return 0;
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 2;
  }
}
