-- wrk's request generator. Reads one JSON body a line from the file in BENCH_BODIES; each holds the word 00000000 once, which
-- is replaced by a running number, so that no two prompts share a block. Prints one JSON line.

local head = 'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: '
local before, after, sent = {}, {}, 0
local offset = tonumber(os.getenv('BENCH_OFFSET') or '0')

for body in io.lines(os.getenv('BENCH_BODIES')) do
  local at = body:find('00000000', 1, true)
  before[#before + 1] = head .. #body .. '\r\n\r\n' .. body:sub(1, at - 1)
  after[#after + 1] = body:sub(at + 8)
end

request = function()
  sent = sent + 1
  local i = sent % #before + 1
  return before[i] .. string.format('%08d', offset + sent) .. after[i]
end

done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"requests":%d,"seconds":%.6f,"bytes":%d,"bad":%d,"p50_ms":%.3f,"p99_ms":%.3f}\n',
    summary.requests, summary.duration / 1e6, summary.bytes,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
