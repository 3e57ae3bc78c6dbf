/* The passes of eager.py, each in one read and one write of memory. Compiled by native.py, once for each pair of dtypes
 * and each pattern:
 *
 *   WEIGHT, STATE   dtype of the weights and of their state: 32 float32, 16 bfloat16, 15 float16
 *   GROUP, KEEP     the pattern; without them, only the passes that know no groups
 *
 * Bits are those of eager.py: no fused multiply-add, no reassociation, rounding to nearest even. Sums are taken over
 * pieces of a fixed size, so they do not depend on the number of threads.
 */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FLOAT32 32
#define BFLOAT16 16
#define FLOAT16 15

#if (WEIGHT == FLOAT16 || STATE == FLOAT16) && !defined(__FLT16_MAX__)
#error "this compiler has no _Float16"
#endif

#define INLINE static inline __attribute__((always_inline))

/* ---- numbers */

INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float bfloat16_to_float(uint16_t bits) { return float_of((uint32_t)bits << 16); }

INLINE uint16_t bfloat16_of(float x) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : (uint16_t)rounded;
}

#ifdef __FLT16_MAX__
INLINE float float16_to_float(uint16_t bits) {
  _Float16 x;
  memcpy(&x, &bits, sizeof x);
  return (float)x;
}

INLINE uint16_t float16_of(float x) {
  _Float16 y = (_Float16)x;
  uint16_t bits;
  memcpy(&bits, &y, sizeof bits);
  return bits;
}
#endif

#if WEIGHT == FLOAT32
typedef uint32_t weight_t;
#define LOAD_W(bits) float_of(bits)
#define STORE_W(x) bits_of(x)
#elif WEIGHT == BFLOAT16
typedef uint16_t weight_t;
#define LOAD_W(bits) bfloat16_to_float(bits)
#define STORE_W(x) bfloat16_of(x)
#else
typedef uint16_t weight_t;
#define LOAD_W(bits) float16_to_float(bits)
#define STORE_W(x) float16_of(x)
#endif

#if STATE == FLOAT32
typedef uint32_t state_t;
#define LOAD_S(bits) float_of(bits)
#define STORE_S(x) bits_of(x)
#elif STATE == BFLOAT16
typedef uint16_t state_t;
#define LOAD_S(bits) bfloat16_to_float(bits)
#define STORE_S(x) bfloat16_of(x)
#else
typedef uint16_t state_t;
#define LOAD_S(bits) float16_to_float(bits)
#define STORE_S(x) float16_of(x)
#endif

/* The largest key of a number, plus one: what all NaNs rank as. */
#define NAN_KEY(kind) ((kind) == FLOAT32 ? 0x7F800001 : (kind) == BFLOAT16 ? 0x7F81 : 0x7C01)
#define AT_MOST(key, limit) ((key) > (limit) ? (limit) : (key))

#define KEY_S(bits) AT_MOST((int32_t)((bits) & (state_t)(SIGN_S - 1)), NAN_KEY(STATE))
#define KEY_W(bits) AT_MOST((int32_t)((bits) & (weight_t)(SIGN_W - 1)), NAN_KEY(WEIGHT))
INLINE float root_of(float h, int64_t roots) {
  h = h < 1e-20f ? 1e-20f : h; /* a NaN stays */
  return roots == 1 ? sqrtf(h) : sqrtf(sqrtf(h));
}

#define KEY_OF_FLOAT(x) AT_MOST((int32_t)(bits_of(x) & 0x7FFFFFFFu), NAN_KEY(FLOAT32))

/* A conversion between equal dtypes leaves every bit, also that of a NaN. */
#if WEIGHT == STATE
#define W_TO_S(bits) (bits)
#define S_TO_W(bits) (bits)
#else
#define W_TO_S(bits) STORE_S(LOAD_W(bits))
#define S_TO_W(bits) STORE_W(LOAD_S(bits))
#endif

#define SIGN_W ((weight_t)1 << (8 * sizeof(weight_t) - 1))
#define SIGN_S ((state_t)1 << (8 * sizeof(state_t) - 1))

/* ---- threads */

typedef struct {
  void *a, *b;
  const void *c;
  int64_t outer, width, inner; /* passes without groups: outer is the number of entries */
  int64_t packed;              /* whether a mask is packed into bits */
} job_t;

typedef struct {
  double scalar;
  double *figures;
  int64_t with_dual, seeded;
  uint64_t seed;
  int64_t roots; /* how many square roots make a factor of what job_t.c holds; 0 if it is the factor */
} option_t;

typedef void (*body_t)(const job_t *, int64_t block, const option_t *);

typedef struct {
  body_t body;
  const job_t *jobs;
  const int64_t *starts; /* first block of each job, and the end */
  int64_t count, next;
  const option_t *option;
} share_t;

/* Each thread takes the next block: a core that is busy elsewhere holds nobody up. */
static void *work(void *argument) {
  share_t *share = argument;
  int64_t j = 0;
  for (;;) {
    const int64_t block = __atomic_fetch_add(&share->next, 1, __ATOMIC_RELAXED);
    if (block >= share->starts[share->count]) return NULL;
    while (share->starts[j + 1] <= block) j++;
    share->body(&share->jobs[j], block - share->starts[j], share->option);
  }
}

#define MOST_THREADS 256
#define STACK (4 << 20) /* some systems give threads less than the local arrays of wide groups need */

static void spread(body_t body, const job_t *jobs, const int64_t *starts, int64_t count, const option_t *option,
                   int64_t threads) {
  share_t share = {body, jobs, starts, count, 0, option};
  pthread_t handles[MOST_THREADS];
  pthread_attr_t attributes;
  int64_t started = 0;
  if (threads > starts[count]) threads = starts[count];
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  if (threads > 1 && pthread_attr_init(&attributes) == 0) {
    pthread_attr_setstacksize(&attributes, STACK);
    while (started < threads - 1 && pthread_create(&handles[started], &attributes, work, &share) == 0) started++;
    pthread_attr_destroy(&attributes);
  }
  work(&share);
  while (started > 0) pthread_join(handles[--started], NULL);
}

/* ---- masks: all bits set where an entry is kept */

#define PIECE 512 /* entries in the local arrays of the passes without groups */

typedef int32_t eight_t __attribute__((vector_size(32)));

INLINE void load_mask(const void *mask, int64_t packed, int64_t at, int64_t n, int32_t *kept) {
  if (packed) {
    const uint8_t *bytes = (const uint8_t *)mask + at / 8;
    const eight_t shifts = {0, 1, 2, 3, 4, 5, 6, 7};
    for (int64_t i = 0; i < n / 8; i++) {
      eight_t byte = (eight_t){0, 0, 0, 0, 0, 0, 0, 0} + (int32_t)bytes[i];
      eight_t ones = -((byte >> shifts) & 1);
      memcpy(kept + 8 * i, &ones, sizeof ones);
    }
  } else {
    const uint8_t *bytes = (const uint8_t *)mask + at;
    for (int64_t i = 0; i < n; i++) kept[i] = -(int32_t)bytes[i];
  }
}

INLINE void store_mask(void *mask, int64_t packed, int64_t at, int64_t n, const int32_t *kept) {
  if (packed) {
    uint8_t *bytes = (uint8_t *)mask + at / 8;
    for (int64_t i = 0; i < n / 8; i++) {
      uint32_t byte = 0;
      for (int k = 0; k < 8; k++) byte |= (uint32_t)(kept[8 * i + k] & (1 << k));
      bytes[i] = (uint8_t)byte;
    }
  } else {
    uint8_t *bytes = (uint8_t *)mask + at;
    for (int64_t i = 0; i < n; i++) bytes[i] = (uint8_t)(kept[i] & 1);
  }
}

#ifndef GROUP

/* ---- passes without groups */

#define BLOCK 65536

#define RANGE                                                    \
  const int64_t first = block * BLOCK;                           \
  const int64_t n = job->outer - first < BLOCK ? job->outer - first : BLOCK

static void add_penalty(const job_t *job, int64_t block, const option_t *option) {
  RANGE;
  weight_t *restrict g = (weight_t *)job->a + first;
  const weight_t *restrict w = (const weight_t *)job->b + first;
  const state_t *restrict v = (const state_t *)job->c + first;
  const float rho = (float)option->scalar;
  for (int64_t i = 0; i < n; i++) g[i] = STORE_W(LOAD_W(g[i]) + rho * (LOAD_W(w[i]) - LOAD_S(v[i])));
}

static void pull(const job_t *job, int64_t block, const option_t *option) {
  RANGE;
  weight_t *restrict w = (weight_t *)job->a + first;
  const state_t *restrict v = (const state_t *)job->b + first;
  const float near = (float)option->scalar, far = 1.0f - near;
  /* From the nearer end, so that fractions of 0 and 1 arrive exactly. */
  if (near < 0.5f)
    for (int64_t i = 0; i < n; i++) w[i] = STORE_W(LOAD_W(w[i]) + near * (LOAD_S(v[i]) - LOAD_W(w[i])));
  else
    for (int64_t i = 0; i < n; i++) w[i] = STORE_W(LOAD_S(v[i]) - far * (LOAD_S(v[i]) - LOAD_W(w[i])));
}

static void reveal(const job_t *job, int64_t block, const option_t *option) {
  RANGE;
  (void)option;
  weight_t *restrict w = (weight_t *)job->a + first;
  const state_t *restrict h = (const state_t *)job->b + first;
  for (int64_t i = 0; i < n; i++) w[i] = h[i] ? S_TO_W(h[i]) : w[i];
}

static void conceal(const job_t *job, int64_t block, const option_t *option) {
  RANGE;
  weight_t *restrict w = (weight_t *)job->a + first;
  state_t *restrict h = (state_t *)job->b + first;
  const float shown = (float)(1.0 - option->scalar);
  if (option->scalar == 0.0) {
    for (int64_t i = 0; i < n; i++) {
      state_t bits = W_TO_S(w[i]);
      bits = bits ? bits : SIGN_S;
      h[i] = h[i] ? bits : 0;
    }
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    weight_t bits_w = w[i];
    state_t bits = W_TO_S(bits_w);
    bits = bits ? bits : SIGN_S;
    weight_t smaller = STORE_W(LOAD_W(bits_w) * shown);
    w[i] = h[i] ? smaller : bits_w;
    h[i] = h[i] ? bits : 0;
  }
}

#define MASKED_PASS(name, expression)                                                        \
  static void name(const job_t *job, int64_t block, const option_t *option) {                \
    RANGE;                                                                                   \
    weight_t *restrict w = (weight_t *)job->a;                                               \
    const float x = (float)option->scalar;                                                   \
    (void)x;                                                                                 \
    int32_t kept[PIECE];                                                                     \
    for (int64_t at = first; at < first + n; at += PIECE) {                                  \
      const int64_t m = first + n - at < PIECE ? first + n - at : PIECE;                     \
      load_mask(job->b, job->packed, at, m, kept);                                           \
      for (int64_t i = 0; i < m; i++) {                                                      \
        const weight_t bits = w[at + i], ones = (weight_t)kept[i];                           \
        w[at + i] = (bits & ones) | ((weight_t)(expression) & (weight_t)~ones);              \
      }                                                                                      \
    }                                                                                        \
  }

MASKED_PASS(shrink, STORE_W(LOAD_W(bits) / x))
MASKED_PASS(restore, STORE_W(LOAD_W(bits) * x))
MASKED_PASS(keep_only, 0)

#define ENTRY(name)                                                                                              \
  void run_##name(const job_t *jobs, const int64_t *starts, int64_t count, const option_t *option, int64_t t) {  \
    spread(name, jobs, starts, count, option, t);                                                                \
  }

ENTRY(add_penalty)
ENTRY(pull)
ENTRY(reveal)
ENTRY(conceal)
ENTRY(shrink)
ENTRY(restore)
ENTRY(keep_only)

int64_t block_size(void) { return BLOCK; }

#else

/* ---- ranking */

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef int32_t lanes_t __attribute__((vector_size(4 * LANES)));
typedef float floats_t __attribute__((vector_size(4 * LANES)));

/* A chunk holds COLUMNS groups; in memory order if the grouped dimension is the innermost, else by rows of COLUMNS. */
#define COLUMNS (8 * (GROUP >= 128 ? 1 : 128 / GROUP))
#define CHUNK (GROUP * COLUMNS)
#define ROOM (CHUNK + LANES)
#define CHUNKS_PER_BLOCK 64

#define IN_LANES (GROUP <= LANES && (GROUP & (GROUP - 1)) == 0)

/* Whole chunks never leave the registers then; float16 needs conversions that are no plain shifts. */
#define IN_REGISTERS (IN_LANES && LANES >= 8 && WEIGHT != FLOAT16 && STATE != FLOAT16)

#if IN_LANES

typedef struct {
  lanes_t place[GROUP], lower[GROUP];
} turns_t;

INLINE turns_t turns(void) {
  turns_t t;
  for (int r = 1; r < GROUP; r++)
    for (int l = 0; l < LANES; l++) {
      t.place[r][l] = l / GROUP * GROUP + (l % GROUP + r) % GROUP;
      t.lower[r][l] = l % GROUP + r >= GROUP;
    }
  return t;
}

/* Each lane counts the others of its group that go before it: larger ones, and equal ones of lower index. */
INLINE lanes_t rank_lanes(lanes_t mine, const turns_t *t) {
  lanes_t before = {0};
  if (KEEP == GROUP) return before - 1;
  for (int r = 1; r < GROUP; r++) {
#ifdef __clang__
    lanes_t other;
    for (int l = 0; l < LANES; l++) other[l] = mine[t->place[r][l]];
#else
    lanes_t other = __builtin_shuffle(mine, t->place[r]);
#endif
    before -= other > mine - t->lower[r];
  }
  return before < KEEP;
}

INLINE void rank_groups(const int32_t *key, int32_t *kept, int64_t n) {
  const turns_t t = turns();
  for (int64_t i = 0; i < n; i += LANES) {
    lanes_t mine;
    memcpy(&mine, key + i, sizeof mine);
    const lanes_t ones = rank_lanes(mine, &t);
    memcpy(kept + i, &ones, sizeof ones);
  }
}

#else

/* The smallest kept key is built bit by bit: the largest number that at least KEEP keys reach. */
INLINE void rank_one_group(const int32_t *key, int32_t *kept) {
  int32_t least = 0;
  for (int bit = 30; bit >= 0; bit--) {
    const int32_t trial = least | (int32_t)1 << bit;
    int32_t reached = 0;
    for (int i = 0; i < GROUP; i++) reached += key[i] >= trial;
    least = reached >= KEEP ? trial : least;
  }
  int32_t above = 0;
  for (int i = 0; i < GROUP; i++) above += key[i] > least;
  int32_t ties = KEEP - above;
  for (int i = 0; i < GROUP; i++) {
    const int tie = key[i] == least;
    kept[i] = -(int32_t)(key[i] > least || (tie && ties > 0));
    ties -= tie;
  }
}

#endif

#if GROUP <= 32

/* Rows of COLUMNS keys, one group a column. */
INLINE void rank_columns(const int32_t *key, int32_t *kept) {
  for (int c = 0; c < COLUMNS; c += 8) {
    int32_t before[GROUP][8];
    memset(before, 0, sizeof before);
    for (int i = 0; i < GROUP; i++)
      for (int j = i + 1; j < GROUP; j++)
        for (int l = 0; l < 8; l++) {
          const int32_t overtaken = key[j * COLUMNS + c + l] > key[i * COLUMNS + c + l];
          before[i][l] += overtaken;
          before[j][l] += 1 - overtaken;
        }
    for (int i = 0; i < GROUP; i++)
      for (int l = 0; l < 8; l++) kept[i * COLUMNS + c + l] = -(int32_t)(before[i][l] < KEEP);
  }
}

#endif

INLINE void to_columns(const int32_t *from, int32_t *to) {
  for (int c = 0; c < COLUMNS; c++)
    for (int i = 0; i < GROUP; i++) to[i * COLUMNS + c] = from[c * GROUP + i];
}

INLINE void from_columns(const int32_t *from, int32_t *to) {
  for (int c = 0; c < COLUMNS; c++)
    for (int i = 0; i < GROUP; i++) to[c * GROUP + i] = from[i * COLUMNS + c];
}

/* kept = all bits set for the KEEP largest keys of each group. Whole chunks are ranked; what lies beyond n is ignored. */
INLINE void rank(const int32_t *key, int32_t *kept, int64_t n, int by_columns) {
  (void)n;
  if (KEEP == GROUP) {
    memset(kept, 0xFF, sizeof(int32_t) * CHUNK);
    return;
  }
#if GROUP <= 32
  if (by_columns) {
    rank_columns(key, kept);
    return;
  }
#endif
#if IN_LANES
  rank_groups(key, kept, n);
#elif GROUP <= 32
  int32_t turned[CHUNK], chosen[CHUNK];
  to_columns(key, turned);
  rank_columns(turned, chosen);
  from_columns(chosen, kept);
#else
  if (by_columns) {
    int32_t turned[CHUNK], chosen[CHUNK];
    from_columns(key, turned);
    for (int c = 0; c < COLUMNS; c++) rank_one_group(turned + c * GROUP, chosen + c * GROUP);
    to_columns(chosen, kept);
  } else {
    for (int64_t i = 0; i < n; i += GROUP) rank_one_group(key + i, kept + i);
  }
#endif
}

INLINE float sum_of_squares(float *x, int64_t n) {
  floats_t sums = {0};
  memset(x + n, 0, sizeof(float) * LANES); /* the arrays have room for it */
  for (int64_t i = 0; i < n; i += LANES) {
    floats_t part;
    memcpy(&part, x + i, sizeof part);
    sums += part * part;
  }
  float sum = 0;
  for (int l = 0; l < LANES; l++) sum += sums[l];
  return sum;
}

/* ---- passes with groups */

INLINE int32_t hash(uint32_t place, uint32_t seed) {
  uint32_t h = place * 0x9E3779B1u + seed;
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return (int32_t)(h ^ (h >> 16));
}


typedef enum { CONSENSUS, HIDDEN, MASK } kind_t;

/* One chunk: rows runs of `run` entries, `stride` apart, from entry `at` on; locally they are `step` apart. */
INLINE void chunk(kind_t kind, const job_t *job, const option_t *option, int64_t at, int64_t rows, int64_t run,
                  int64_t stride, int64_t step, int by_columns, double *figures) {
  const weight_t *w = job->a;
  state_t *s = job->b;
  const float *factor = job->c;
  /* Whole chunks are ranked: what a ragged one lacks must be numbers as well. */
  int32_t key[ROOM], old[ROOM], new[ROOM];
  float value[ROOM], moved[ROOM];
  state_t narrow[ROOM];
  if (rows * run < CHUNK) memset(key, 0, sizeof key);
  const int64_t used = by_columns ? CHUNK : run;

  if (kind == CONSENSUS) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < run; i++) key[r * step + i] = KEY_S(s[at + r * stride + i]);
    rank(key, old, used, by_columns);
    const uint32_t seed = (uint32_t)option->seed;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < run; i++) {
        const int64_t from = at + r * stride + i, to = r * step + i;
        const float u = float_of(bits_of(-LOAD_S(s[from])) & ~(uint32_t)old[to]);
        const float a = LOAD_W(w[from]) + u;
        state_t bits = STORE_S(a);
#if STATE == BFLOAT16 && WEIGHT == FLOAT32
        if (option->seeded) {
          const uint32_t up = bits_of(a) + ((uint32_t)hash((uint32_t)from, seed) & 0xFFFFu);
          bits = (bits_of(a) & 0x7F800000u) == 0x7F800000u ? bits : (state_t)(up >> 16);
        }
#else
        (void)seed;
#endif
        narrow[to] = bits;
        key[to] = KEY_S(bits);
        moved[to] = float_of(bits_of(LOAD_S(s[from])) & (uint32_t)old[to]);
        value[to] = LOAD_W(w[from]);
      }
    rank(key, new, used, by_columns);
    const float scale = (float)option->scalar;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < run; i++) {
        const int64_t to = r * step + i;
        const state_t a = narrow[to], kept = (state_t)new[to];
        moved[to] = float_of(bits_of(LOAD_S(a)) & (uint32_t)new[to]) - moved[to];
        /* A dual of zero is stored as -0.0, so that u, read as -v, is +0.0. */
        const state_t dual = option->with_dual ? (scale == 1.0f ? a : STORE_S(LOAD_S(a) * scale)) : 0;
        s[at + r * stride + i] = (state_t)((a & kept) | ((dual ^ SIGN_S) & (state_t)~kept));
      }
  } else {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t from = at + r * stride, to = r * step;
      for (int64_t i = 0; i < run; i++) value[to + i] = LOAD_W(w[from + i]);
      if (factor && option->roots)
        for (int64_t i = 0; i < run; i++)
          key[to + i] = KEY_OF_FLOAT(value[to + i] * root_of(factor[from + i], option->roots));
      else if (factor)
        for (int64_t i = 0; i < run; i++)
          key[to + i] = KEY_OF_FLOAT(value[to + i] * factor[from + i]);
      else
        for (int64_t i = 0; i < run; i++) key[to + i] = KEY_W(w[from + i]);
      if (kind == MASK)
        load_mask(job->b, job->packed, from, run, old + to);
      else
        for (int64_t i = 0; i < run; i++) old[to + i] = -(int32_t)(s[from + i] == 0);
    }
    rank(key, new, used, by_columns);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t from = at + r * stride, to = r * step;
      for (int64_t i = 0; i < run; i++)
        moved[to + i] = float_of(bits_of(value[to + i]) & (uint32_t)(old[to + i] ^ new[to + i]));
      if (kind == MASK)
        store_mask(job->b, job->packed, from, run, new + to);
      else
        for (int64_t i = 0; i < run; i++) {
          state_t bits = W_TO_S(w[from + i]);
          bits = bits ? bits : SIGN_S;
          s[from + i] = (state_t)(bits & (state_t)~new[to + i]);
        }
    }
  }

  int32_t gained = 0, kept = 0;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = 0; i < run; i++) {
      gained += new[r * step + i] & ~old[r * step + i] & 1;
      kept += new[r * step + i] & 1;
    }
    if (r + 1 == rows || step != run) {
      /* Rows that lie close together are one run; a row apart is summed before its neighbour is overwritten. */
      float *from_moved = step == run ? moved : moved + r * step, *from_value = step == run ? value : value + r * step;
      const int64_t n = step == run ? rows * run : run;
      float room[ROOM];
      memcpy(room, from_moved, sizeof(float) * (size_t)n);
      figures[0] += sum_of_squares(room, n);
      memcpy(room, from_value, sizeof(float) * (size_t)n);
      figures[1] += sum_of_squares(room, n);
    }
  }
  figures[2] += gained;
  figures[3] += kept;
}

#if IN_REGISTERS

typedef uint32_t words_t __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves_t __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes_t __attribute__((vector_size(LANES)));

/* The bits of LANES entries, 16-bit ones in the lower half of a word; as a float, with which they are the upper one. */
#define LANES_OF(name, type, narrow)                                             \
  INLINE words_t load_##name(const type *from) {                                 \
    if (!narrow) {                                                               \
      words_t bits;                                                              \
      memcpy(&bits, from, sizeof bits);                                          \
      return bits;                                                               \
    }                                                                            \
    halves_t bits;                                                               \
    memcpy(&bits, from, sizeof bits);                                            \
    return __builtin_convertvector(bits, words_t);                               \
  }                                                                              \
  INLINE floats_t float_##name(words_t bits) {                                   \
    if (narrow) bits <<= 16;                                                     \
    floats_t x;                                                                  \
    memcpy(&x, &bits, sizeof x);                                                 \
    return x;                                                                    \
  }                                                                              \
  INLINE words_t round_##name(floats_t x) {                                      \
    words_t bits;                                                                \
    memcpy(&bits, &x, sizeof bits);                                              \
    if (!narrow) return bits;                                                    \
    const words_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;        \
    const words_t nan = (words_t)((bits & 0x7FFFFFFFu) > 0x7F800000u);           \
    return (rounded & ~nan) | (nan & 0x7FC0u);                                   \
  }

LANES_OF(w, weight_t, (WEIGHT == BFLOAT16))
LANES_OF(s, state_t, (STATE == BFLOAT16))

INLINE void store_s(state_t *to, words_t bits) {
  if (STATE == FLOAT32) {
    memcpy(to, &bits, sizeof bits);
  } else {
    const halves_t halves = __builtin_convertvector(bits, halves_t);
    memcpy(to, &halves, sizeof halves);
  }
}

INLINE lanes_t lanes_key(words_t magnitude, int32_t nan_key) {
  const lanes_t key = (lanes_t)magnitude, over = key > nan_key;
  return (key & ~over) | (nan_key & over);
}

INLINE floats_t float_where(words_t ones, floats_t x) {
  words_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= ones;
  memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE words_t lanes_of_mask(const void *mask, int64_t packed, int64_t at) {
  if (packed) {
    uint32_t bits = ((const uint8_t *)mask)[at / 8];
    if (LANES == 16) bits |= (uint32_t)((const uint8_t *)mask)[at / 8 + 1] << 8;
    words_t shifts;
    for (int l = 0; l < LANES; l++) shifts[l] = (uint32_t)l;
    return -(((words_t){0} + bits) >> shifts & 1u);
  }
  bytes_t bytes;
  memcpy(&bytes, (const uint8_t *)mask + at, sizeof bytes);
  return -__builtin_convertvector(bytes, words_t);
}

INLINE void mask_of_lanes(void *mask, int64_t packed, int64_t at, words_t ones) {
  const bytes_t bytes = __builtin_convertvector(ones & 1u, bytes_t);
  if (!packed) {
    memcpy((uint8_t *)mask + at, &bytes, sizeof bytes);
    return;
  }
  /* Eight bytes of 0 or 1, multiplied by this, end as the bits of the uppermost one. */
  for (int b = 0; b < LANES / 8; b++) {
    uint64_t word;
    memcpy(&word, (const uint8_t *)&bytes + 8 * b, sizeof word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    ((uint8_t *)mask)[at / 8 + b] = (uint8_t)(word * 0x0102040810204080u >> 56);
  }
}

/* A whole chunk of groups in memory order: what chunk() does, without a detour over local arrays. */
INLINE void whole_chunk(kind_t kind, const job_t *job, const option_t *option, int64_t at, double *figures) {
  const weight_t *w = job->a;
  state_t *s = job->b;
  const float *factor = job->c ? (const float *)job->c + at : NULL;
  float worked_out[CHUNK];
  if (factor && option->roots) {
    for (int64_t i = 0; i < CHUNK; i++) worked_out[i] = root_of(factor[i], option->roots);
    factor = worked_out;
  }
  const turns_t t = turns();
  const words_t sign = (words_t){0} + (uint32_t)SIGN_S;
  const float scale = (float)option->scalar;
  floats_t moved = {0}, squares = {0};
  lanes_t gained = {0}, kept = {0};
  for (int64_t i = at; i < at + CHUNK; i += LANES) {
    const words_t w_bits = load_w(w + i);
    const floats_t value = float_w(w_bits);
    words_t old, new;
    if (kind == CONSENSUS) {
      const words_t v = load_s(s + i);
      old = (words_t)rank_lanes(lanes_key(v & (uint32_t)(SIGN_S - 1), NAN_KEY(STATE)), &t);
      const floats_t sum = value + float_where(~old, -float_s(v));
      words_t a = round_s(sum);
      if (WEIGHT == FLOAT32 && STATE == BFLOAT16 && option->seeded) {
        words_t h, bits, finite;
        for (int l = 0; l < LANES; l++) h[l] = (uint32_t)(i + l);
        h = h * 0x9E3779B1u + (uint32_t)option->seed;
        h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
        h = (h ^ (h >> 13)) * 0xC2B2AE35u;
        h = (h ^ (h >> 16)) & 0xFFFFu;
        memcpy(&bits, &sum, sizeof bits);
        finite = (words_t)((bits & 0x7F800000u) != 0x7F800000u);
        a = (((bits + h) >> 16) & finite) | (a & ~finite);
      }
      new = (words_t)rank_lanes(lanes_key(a & (uint32_t)(SIGN_S - 1), NAN_KEY(STATE)), &t);
      const floats_t way = float_where(new, float_s(a)) - float_where(old, float_s(v));
      moved += way * way;
      words_t dual = {0};
      if (option->with_dual) dual = scale == 1.0f ? a : round_s(float_s(a) * scale);
      store_s(s + i, (a & new) | ((dual ^ sign) & ~new));
    } else {
      words_t key = w_bits & (uint32_t)(SIGN_W - 1);
      if (factor) {
        floats_t f;
        memcpy(&f, factor + (i - at), sizeof f);
        f *= value;
        memcpy(&key, &f, sizeof key);
        key &= 0x7FFFFFFFu;
      }
      new = (words_t)rank_lanes(lanes_key(key, factor ? NAN_KEY(FLOAT32) : NAN_KEY(WEIGHT)), &t);
      if (kind == MASK) {
        old = lanes_of_mask(job->b, job->packed, i);
        mask_of_lanes(job->b, job->packed, i, new);
      } else {
        old = (words_t)(load_s(s + i) == 0);
        words_t bits = WEIGHT == STATE ? w_bits : round_s(value);
        bits |= (words_t)(bits == 0) & sign;
        store_s(s + i, bits & ~new);
      }
      const floats_t way = float_where(old ^ new, value);
      moved += way * way;
    }
    squares += value * value;
    gained -= (lanes_t)(new & ~old);
    kept -= (lanes_t)new;
  }
  float sums[2] = {0, 0};
  int32_t counts[2] = {0, 0};
  for (int l = 0; l < LANES; l++) {
    sums[0] += moved[l];
    sums[1] += squares[l];
    counts[0] += gained[l];
    counts[1] += kept[l];
  }
  for (int k = 0; k < 2; k++) {
    figures[k] += sums[k];
    figures[k + 2] += counts[k];
  }
}

#endif

INLINE void block_of_chunks(kind_t kind, const job_t *job, int64_t block, const option_t *option) {
  double figures[4] = {0, 0, 0, 0};
  if (job->inner == 1) {
    const int64_t count = job->outer * job->width, chunks = (count + CHUNK - 1) / CHUNK;
    const int64_t end = (block + 1) * CHUNKS_PER_BLOCK < chunks ? (block + 1) * CHUNKS_PER_BLOCK : chunks;
    for (int64_t c = block * CHUNKS_PER_BLOCK; c < end; c++) {
      const int64_t run = count - c * CHUNK < CHUNK ? count - c * CHUNK : CHUNK;
#if IN_REGISTERS
      if (run == CHUNK) {
        whole_chunk(kind, job, option, c * CHUNK, figures);
        continue;
      }
#endif
      chunk(kind, job, option, c * CHUNK, 1, run, 0, run, 0, figures);
    }
  } else {
    const int64_t tiles = (job->inner + COLUMNS - 1) / COLUMNS, groups = job->width / GROUP;
    const int64_t chunks = job->outer * groups * tiles;
    const int64_t end = (block + 1) * CHUNKS_PER_BLOCK < chunks ? (block + 1) * CHUNKS_PER_BLOCK : chunks;
    for (int64_t c = block * CHUNKS_PER_BLOCK; c < end; c++) {
      const int64_t column = c % tiles * COLUMNS, group = c / tiles; /* of all groups, outer ones included */
      const int64_t run = job->inner - column < COLUMNS ? job->inner - column : COLUMNS;
      chunk(kind, job, option, group * GROUP * job->inner + column, GROUP, run, job->inner, COLUMNS, 1, figures);
    }
  }
  memcpy(option->figures + 4 * block, figures, sizeof figures);
}

static void advance(const job_t *job, int64_t block, const option_t *option) {
  block_of_chunks(CONSENSUS, job, block, option);
}

static void advance_hidden(const job_t *job, int64_t block, const option_t *option) {
  block_of_chunks(HIDDEN, job, block, option);
}

static void advance_mask(const job_t *job, int64_t block, const option_t *option) {
  block_of_chunks(MASK, job, block, option);
}

/* The figures of one weight; their sum is taken in the order of the blocks. Returns 0, or 1 if memory is short. */
static int run_grouped(body_t body, const job_t *job, const option_t *given, int64_t threads, double *total) {
  const int64_t chunks = job->inner == 1 ? (job->outer * job->width + CHUNK - 1) / CHUNK
                                         : job->outer * (job->width / GROUP) * ((job->inner + COLUMNS - 1) / COLUMNS);
  const int64_t starts[2] = {0, (chunks + CHUNKS_PER_BLOCK - 1) / CHUNKS_PER_BLOCK};
  option_t option = *given;
  option.figures = malloc(sizeof(double) * 4 * (size_t)(starts[1] + 1));
  if (!option.figures) return 1;
  spread(body, job, starts, 1, &option, threads);
  for (int k = 0; k < 4; k++) total[k] = 0;
  for (int64_t b = 0; b < starts[1]; b++)
    for (int k = 0; k < 4; k++) total[k] += option.figures[4 * b + k];
  free(option.figures);
  return 0;
}

#define ENTRY(name)                                                                                  \
  int run_##name(const job_t *job, const option_t *option, int64_t threads, double *total) {         \
    return run_grouped(name, job, option, threads, total);                                           \
  }

ENTRY(advance)
ENTRY(advance_hidden)
ENTRY(advance_mask)

#endif
