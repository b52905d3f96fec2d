// llama.cpp on the same file, tokens and threads: node benchmarks/llamacpp.mjs FOLDER < request.json
// FOLDER holds node_modules with node-llama-cpp. The request is {model, tokens, steps, rounds, threads}; the answer,
// one line of JSON, is {prefill: [seconds per round], decode: [seconds per token, one per round]}.
import {createRequire} from "node:module";
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const place = createRequire(process.argv[2] + "/").resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(place));
const asked = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: asked.threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: asked.model});
const context = await model.createContext({
    contextSize: asked.tokens.length + asked.steps + 8, threads: asked.threads, flashAttention: true
});
const sequence = context.getSequence();
const found = {prefill: [], decode: []};
for (let round = 0; round <= asked.rounds; round++) {
    await sequence.clearHistory();
    let start = performance.now();
    await sequence.evaluateWithoutGeneratingNewTokens(asked.tokens);
    const read = (performance.now() - start) / 1000;
    start = performance.now();
    for (let step = 0; step < asked.steps; step++)
        await sequence.evaluateWithoutGeneratingNewTokens([asked.tokens[step]]);
    if (round > 0) {  // the first one warms up
        found.prefill.push(read);
        found.decode.push((performance.now() - start) / 1000 / asked.steps);
    }
}
console.log(JSON.stringify(found));
process.exit(0);
