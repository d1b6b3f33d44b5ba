// JSON, as far as the description in a model's file needs it: about["preprocessing"]["size"][0].number
#pragma once
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  enum Kind { NONE, TRUE, FALSE, NUMBER, TEXT, LIST, OBJECT } kind = NONE;
  double number = 0;
  std::string text;
  std::vector<Json> list;
  std::map<std::string, Json> object;

  bool has(const std::string& key) const { return object.count(key) > 0; }
  const Json& operator[](const char* key) const {
    if (!has(key)) throw std::runtime_error(std::string("the file says nothing of '") + key + "'; export it with rarefy");
    return object.at(key);
  }
  const Json& operator[](int place) const { return list.at(place); }

  static Json parse(const std::string& source) {
    size_t at = 0;
    return value(source, at, 0);
  }

 private:
  static void expect(bool good) {
    if (!good) throw std::runtime_error("the file's description is no JSON; export it again with rarefy");
  }
  static char next(const std::string& s, size_t& at) {
    while (at < s.size() && std::string(" \t\r\n").find(s[at]) != std::string::npos) ++at;
    expect(at < s.size());
    return s[at];
  }
  static Json value(const std::string& s, size_t& at, int depth) {
    Json found;
    const char first = next(s, at);
    expect(depth < 64);
    if (first == '{' || first == '[') {
      found.kind = first == '{' ? OBJECT : LIST;
      const char last = first == '{' ? '}' : ']';
      for (++at; next(s, at) != last; at += s[at] == ',') {
        if (found.kind == LIST) {
          found.list.push_back(value(s, at, depth + 1));
        } else {
          const std::string key = quoted(s, at);
          expect(next(s, at) == ':');
          found.object[key] = value(s, ++at, depth + 1);
        }
        expect(next(s, at) == ',' || s[at] == last);
      }
      ++at;
    } else if (first == '"') {
      found.kind = TEXT;
      found.text = quoted(s, at);
    } else if (s.compare(at, 4, "true") == 0 || s.compare(at, 4, "null") == 0) {
      found.kind = first == 't' ? TRUE : NONE;
      at += 4;
    } else if (s.compare(at, 5, "false") == 0) {
      found.kind = FALSE;
      at += 5;
    } else {
      char* end = nullptr;
      found.kind = NUMBER;
      found.number = std::strtod(s.c_str() + at, &end);
      expect(end != s.c_str() + at);
      at = end - s.c_str();
    }
    return found;
  }
  static std::string quoted(const std::string& s, size_t& at) {
    std::string found;
    expect(next(s, at) == '"');
    for (++at; at < s.size() && s[at] != '"'; ++at) {
      if (s[at] != '\\') {
        found += s[at];
        continue;
      }
      expect(++at < s.size());
      const size_t plain = std::string("bfnrt").find(s[at]);
      if (s[at] != 'u') {
        found += plain == std::string::npos ? s[at] : "\b\f\n\r\t"[plain];
        continue;
      }
      unsigned code = unit(s, at);
      if (code >= 0xD800 && code < 0xDC00 && s.compare(at + 1, 2, "\\u") == 0) {  // a pair stands for one letter
        at += 2;
        code = 0x10000 + ((code - 0xD800) << 10) + (unit(s, at) - 0xDC00);
      }
      for (int shift = code < 0x80 ? 0 : code < 0x800 ? 6 : code < 0x10000 ? 12 : 18, begin = shift; shift >= 0; shift -= 6) {
        const unsigned part = code >> shift;
        const unsigned lead = begin == 6 ? 0xC0 : begin == 12 ? 0xE0 : 0xF0;
        found += static_cast<char>(begin == 0 ? part : shift == begin ? (lead | part) : (0x80 | (part & 0x3F)));
      }
    }
    expect(at < s.size());
    ++at;
    return found;
  }
  static unsigned unit(const std::string& s, size_t& at) {  // four hexadecimal digits behind the 'u' at `at`
    expect(at + 4 < s.size());
    const std::string digits = s.substr(at + 1, 4);
    expect(digits.find_first_not_of("0123456789abcdefABCDEF") == std::string::npos);
    at += 4;
    return static_cast<unsigned>(std::strtoul(digits.c_str(), nullptr, 16));
  }
};
