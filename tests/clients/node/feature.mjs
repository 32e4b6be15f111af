// What every client's script has in common: where the server is, and a line for each feature that it tries.
const { POLYPEFT_URL, POLYPEFT_KEY, POLYPEFT_MODEL, POLYPEFT_ADAPTER } = process.env;
export const [baseURL, apiKey, MODEL, ADAPTER] = [`${POLYPEFT_URL}/v1`, POLYPEFT_KEY, POLYPEFT_MODEL, POLYPEFT_ADAPTER];
export const QUESTION = "What is the capital of France?";

export async function feature(name, work) {
  let fault = null;
  try {
    if (!(await work())) fault = "it returned nothing";
  } catch (error) {
    fault = `${error.name}: ${error.message}`.slice(0, 300);
  }
  console.log(JSON.stringify({ feature: name, fault }));
}
